"""The peak memory of a training step, and its arithmetic, from a step on fake tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from tokenseek.config import RunConfig
from tokenseek.errors import UserError, first_line
from tokenseek.launching.engine import Engine, require_splittable
from tokenseek.planning.depth import deepened, depths_that_tell, with_layers
from tokenseek.planning.fake import TakenStep, take_step
from tokenseek.planning.ledger import Stretch
from tokenseek.planning.method import Method, method_of
from tokenseek.planning.shapes import known_shape
from tokenseek.planning.work import Gpu, StepWork, sent_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device at the moment of a step when most are in use.

    Attributes:
        peak: their sum. What CUDA itself takes, and the gaps in its allocator, come on top.
        average: bytes on the device over the whole step, weighted by the estimated time of its operations.
        parts: by category (:data:`~tokenseek.planning.ledger.CATEGORIES`).
        states: parameters, gradients and optimizer states: what a step has before its first token.
        host: the most bytes that the step keeps in host memory at once.
        loading: before the first step, where the engine splits packed weights: those of all processes, which each of
            them packs and holds until they are split. 0 otherwise.
        tokens: (examples, tokens of each) in a micro batch of a process, or of those that share its texts.
        micro_batches: of an optimizer step.
        work: what an optimizer step computes and sends.
        stretches: one micro batch and the optimizer's step, in the order of time.
    """

    method: Method
    engine: Engine
    peak: int
    average: int
    parts: dict[str, int]
    states: int
    host: int
    loading: int
    tokens: tuple[int, int]
    micro_batches: int
    work: StepWork = field(repr=False)
    stretches: list[Stretch] = field(repr=False)

    @property
    def peaks_in_optimizer(self) -> bool:
        """Whether the optimizer's step, where no activation of a token is alive, comes within 1 % of the peak."""
        return any(stretch.name == "optimizer" and stretch.peak >= 0.99 * self.peak for stretch in self.stretches)

    def as_dict(self, gpu: Gpu | None = None) -> dict:
        """What JSON takes; with the seconds on a GPU, if one is given."""
        work: dict[str, float] = {"flops": self.work.flops, "sent": self.work.sent, "launches": self.work.launches}
        if gpu:
            work |= {"seconds": self.work.seconds(gpu), "launching_seconds": self.work.launches * gpu.launch}
            work["sending_seconds"] = self.work.sending_seconds(gpu)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stretches"} | {
            "method": asdict(self.method),
            "engine": asdict(self.engine),
            "work": work,
        }


def plan_memory(
    config: RunConfig,
    method: Method | None = None,
    engine: Engine | None = None,
    *,
    tokens: int | None = None,
    model_config: PreTrainedConfig | None = None,
    every_layer: bool = False,
) -> MemoryPlan:
    """The peak memory of a training step, from the step itself: the model's own code, on fake tensors.

    All examples are taken to be as long as they may be, and all their tokens to carry a loss, so the plan is that of
    the largest batch.

    Args:
        config: the run; neither its weights nor its data are read.
        method: by default what `config` says.
        engine: one process by default.
        tokens: of each example; ``data.max_length`` by default.
        model_config: of the model; by default read from ``model.name_or_path``.
        every_layer: run all layers of the model, also where a few tell the rest (:mod:`tokenseek.planning.depth`).

    Raises:
        UserError: the model has no config that can be read, or the run cannot be planned.

    Example:
        >>> plan_memory(load_config("llama-3.2-1b"), Method(ratio=0.1)).peak
    """
    method, engine = method or method_of(config), engine or Engine()
    require_splittable(engine.kind, config.model.quantization)
    config.require_trainable()
    shape = (config.training.micro_batch, tokens or config.data.max_length)
    model_config = model_config or load_model_config(config)
    depths = None if every_layer else depths_that_tell(config, engine, model_config)
    if depths is None:
        step = take_step(config, method, engine, shape, model_config)
    else:
        shallow, deeper = (
            take_step(config, method, engine, shape, with_layers(model_config, depth)) for depth in depths.of
        )
        step = deepened(shallow, deeper, depths)
    highest = max(step.stretches, key=lambda stretch: stretch.peak)
    micro_batches = config.training.gradient_accumulation_steps
    return MemoryPlan(
        method,
        engine,
        highest.peak,
        round(_average(step, micro_batches)),
        highest.parts,
        sum(highest.parts[name] for name in ("parameters", "gradients", "optimizer")),
        step.host,
        step.weights + step.scales if config.model.quantization and engine.shards_parameters else 0,
        shape,
        micro_batches,
        _work(step, engine, micro_batches),
        step.stretches,
    )


def _average(step: TakenStep, micro_batches: int) -> float:
    """Bytes over the time of a step of so many micro batches."""
    times = [stretch.seconds * (1 if stretch.name == "optimizer" else micro_batches) for stretch in step.stretches]
    return sum(t * s.average for t, s in zip(times, step.stretches, strict=True)) / sum(times)


def _work(step: TakenStep, engine: Engine, micro_batches: int) -> StepWork:
    """What a step of so many micro batches computes and sends."""
    sent = sent_bytes(engine, step.weights, step.trained, step.gathered_more, micro_batches)
    sent += micro_batches * step.exchanged
    operations = Counter(step.optimizer.operations)
    for key, count in step.micro_batch.operations.items():
        operations[key] += micro_batches * count
    return StepWork(step.optimizer.flops + micro_batches * step.micro_batch.flops, sent, operations)


def load_model_config(config: RunConfig) -> PreTrainedConfig:
    """The model's ``config.json`` alone, or its public dimensions where its name is known; no weight is downloaded.

    Raises:
        UserError: there is none.
    """
    model = config.model
    shape = known_shape(model.name_or_path)
    if shape and not (model.revision or model.trust_remote_code or Path(model.name_or_path).exists()):
        return shape.config()
    folder = Path(model.name_or_path).expanduser()
    try:
        return AutoConfig.from_pretrained(
            folder if folder.is_dir() else model.name_or_path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise UserError(
            f"model.name_or_path: {model.name_or_path!r} has no config that Transformers can read ({reason}). Give a "
            "folder with a config.json, or a name on the hub; no weights are needed."
        ) from error


def most_positions(model_config: PreTrainedConfig) -> int | None:
    """How long an example can be at most; None where positions are no table of learned ones."""
    text_config = model_config.get_text_config()
    learned = not getattr(text_config, "rope_parameters", None)
    return getattr(text_config, "max_position_embeddings", None) if learned else None
