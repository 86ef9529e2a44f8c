"""One training step on fake tensors: they have shapes and no data, so any model's step fits anywhere, in seconds."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Trainer, masking_utils
from transformers.initialization import no_init_weights

from tokenseek.config import RunConfig
from tokenseek.decoder.device import planned_for
from tokenseek.decoder.find import Decoder, find_decoder
from tokenseek.decoder.names import enable_checkpointing
from tokenseek.ditching import enable_token_ditching, storage, tiles
from tokenseek.ditching.reach import PlainReach, Reach
from tokenseek.ditching.rows import partition
from tokenseek.ditching.state import require_ditching
from tokenseek.errors import UserError
from tokenseek.launching.engine import Engine, require_whole_weights
from tokenseek.models.loading import add_adapter
from tokenseek.parallel import measured
from tokenseek.planning.ledger import Ledger
from tokenseek.planning.method import Method, method_of
from tokenseek.planning.online import decided, is_online, seeking_of
from tokenseek.planning.packed import pack_linear_layers
from tokenseek.planning.sequence import plan_as_first_rank
from tokenseek.planning.shapes import known_shape
from tokenseek.planning.sharding import ShardedState
from tokenseek.planning.work import Gpu, StepWork, Work, sent_bytes
from tokenseek.training.arguments import training_arguments

_CPU = torch.device("cpu")
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device at the moment of a step when most are in use.

    Attributes:
        peak: their sum. What CUDA itself takes, and the gaps in its allocator, come on top.
        average: bytes on the device over the whole step, weighted by the estimated time of its operations.
        parts: by category (:data:`~tokenseek.planning.ledger.CATEGORIES`).
        states: parameters, gradients and optimizer states: what a step has before its first token.
        tokens: (examples, tokens of each) in a micro batch of a process, or of those that share its texts.
        micro_batches: of an optimizer step.
        work: what an optimizer step computes and sends.
    """

    method: Method
    engine: Engine
    peak: int
    average: int
    parts: dict[str, int]
    states: int
    tokens: tuple[int, int]
    micro_batches: int
    work: StepWork = field(repr=False)

    def as_dict(self, gpu: Gpu | None = None) -> dict:
        """What JSON takes; with the seconds on a GPU, if one is given."""
        work: dict[str, float] = {"flops": self.work.flops, "sent": self.work.sent}
        if gpu:
            work |= {"seconds": self.work.seconds(gpu), "sending_seconds": self.work.sending_seconds(gpu)}
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
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

    Raises:
        UserError: the model has no config that can be read, or the run cannot be planned.

    Example:
        >>> plan_memory(load_config("llama-3.2-1b"), Method(ratio=0.1)).peak
    """
    method, engine = method or method_of(config), engine or Engine()
    if engine.shards_parameters:
        require_whole_weights(engine.kind, config.model.quantization)
    config.require_trainable()
    shape = (config.training.micro_batch, tokens or config.data.max_length)
    model_config = model_config or load_model_config(config)
    make_optimizer = _optimizer(config, engine)
    # Which rows are selected is decided on real positions: the sizes of what follows depend on them.
    positions_BS = None
    if method.ratio is not None:
        positions_BS = _spread_positions(method.ratio, *shape)
    elif engine.sp_size > 1:  # ranks that share a text select all of it
        positions_BS = _spread_positions(1.0, *shape)
    reach = None if positions_BS is None else PlainReach(partition(positions_BS, None, shape[1]))
    parts = None if reach is None else reach.parts
    if reach:
        tiles.tiles_of(reach, config.training.tile_rows)
    if engine.sp_size > 1 and is_online(config, method):
        raise UserError(
            "scoring.mode: online cannot be planned under sequence parallelism (sp_size): plan one rank of it with "
            "scoring.mode=index, or all of it without sp_size."
        )
    model = _build(config, model_config, method, engine)
    if engine.sp_size > 1 and parts is not None:
        plan_as_first_rank(model, engine.sp_size, config.training.sequence_layout, parts)
    decoder, work = find_decoder(model), Work()
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with (
            planned_for(None if engine.on_cpu else "cuda"),  # the fake tensors say that they are on a CPU
            _reaching(model, reach, is_online(config, method)),
            fake,
            Ledger(clock=lambda: work.seconds) as ledger,
            work,
            _LargestBatch(ledger),
            _masks_as_of_real_tensors(),
            storage.copies_watched(partial(_track_stored_kv, ledger)),
            tiles.visited_by(partial(_few_tiles, work)),
        ):
            _materialise(model)
            state = ShardedState(model, decoder, engine, ledger, config.training.mixed_precision, make_optimizer)
            if config.training.gradient_accumulation_steps > 1:
                state.accumulate_before()
            ledger.reset_peak()
            ledger.reset_time()
            work.reset()
            with measured() as traffic:
                _train_pass(
                    model, decoder, state, ledger, config, engine, shape, positions_BS, is_online(config, method)
                )
            passes = StepWork(work.flops, 0, work.operations)
            work.reset()
            ledger.note_time()
            pass_seconds, pass_byte_seconds = ledger.seconds, ledger.byte_seconds
            ledger.reset_time()
            ledger.region = "workspace"
            state.step()
            ledger.note_time()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"{type(decoder.causal_lm).__name__} with training.optim={config.training.optim} cannot be planned: the "
            f"sizes of its tensors depend on the data ({error.func})."
        ) from error
    at_peak = ledger.at_peak
    states = sum(at_peak[name] for name in ("parameters", "gradients", "optimizer"))
    micro_batches = config.training.gradient_accumulation_steps
    seconds = micro_batches * pass_seconds + ledger.seconds
    average = (micro_batches * pass_byte_seconds + ledger.byte_seconds) / seconds
    sent = sent_bytes(engine, _nbytes(state.parameters), _nbytes(state.trained), micro_batches)
    sent += micro_batches * sum([*traffic.forward.values(), *traffic.backward.values()])
    operations = work.operations + Counter({key: micro_batches * n for key, n in passes.operations.items()})
    whole = StepWork(work.flops + micro_batches * passes.flops, sent, operations)
    return MemoryPlan(method, engine, ledger.peak, round(average), at_peak, states, shape, micro_batches, whole)


@contextmanager
def _reaching(model: nn.Module, reach: Reach | None, online: bool) -> Iterator[None]:
    """In the block, the rows of `reach` are those that a step is given, or selects itself."""
    if reach is None:
        yield
    elif online:  # the first of a step's two passes is not for them alone
        require_ditching(model).decided = decided(reach)
        yield
    else:
        with require_ditching(model).handing(reach):
            yield


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def load_model_config(config: RunConfig) -> PreTrainedConfig:
    """The model's ``config.json`` alone, or its public dimensions where its name is known; no weight is downloaded.

    Raises:
        UserError: there is none.
    """
    model = config.model
    shape = known_shape(model.name_or_path)
    if shape and not (model.revision or model.trust_remote_code or Path(model.name_or_path).exists()):
        return shape.config()
    try:
        return AutoConfig.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model.name_or_path: {model.name_or_path!r} has no config that Transformers can read ({reason}). Give a "
            "folder with a config.json, or a name on the hub; no weights are needed."
        ) from error


def _spread_positions(ratio: float, batch: int, tokens: int) -> torch.Tensor:
    """[B, S]: as many positions as a rule selects, spread evenly up to the last token: none can be left out then."""
    count = max(1, int(ratio * tokens + 0.5))
    positions = np.arange(1, count + 1, dtype=np.int64) * tokens // count - 1
    return torch.from_numpy(positions).expand(batch, count).contiguous()


def _build(config: RunConfig, model_config: PreTrainedConfig, method: Method, engine: Engine) -> nn.Module:
    """The model of a run with its adapter, on the meta device."""
    with torch.device("meta"), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(
            model_config,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
        )
        model.tie_weights()
        if config.model.quantization:
            pack_linear_layers(model, config.model)
        if config.peft:
            model = add_adapter(model, config.peft)
    precision = _PRECISIONS.get(config.training.mixed_precision)
    if precision and (engine.is_deepspeed or engine.kind == "fsdp2"):  # these run the model itself in 16 bits
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(precision)
    if method.ratio is not None:
        enable_token_ditching(
            model,
            recompute=method.recompute,
            kv_storage=config.training.kv_storage,
            tile_rows=config.training.tile_rows,
            seeking=seeking_of(config),
        )
    elif method.recompute:
        enable_checkpointing(model)
    return model.train()


def _materialise(model: nn.Module) -> None:
    """Replace meta tensors by tensors of the mode in force."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    new = torch.empty_like(tensor, device="cpu")
                    made[tensor] = nn.Parameter(new, tensor.requires_grad) if tensors is tables[0] else new
                tensors[name] = made[tensor]


def _train_pass(
    model: nn.Module,
    decoder: Decoder,
    state: ShardedState,
    ledger: Ledger,
    config: RunConfig,
    engine: Engine,
    shape: tuple[int, int],
    positions_BS: torch.Tensor | None,
    online: bool,
) -> None:
    """Forward and backward of one micro batch, as Transformers' Trainer takes them."""
    ids = torch.zeros(shape, dtype=torch.int64)
    extra: dict[str, Any] = {} if positions_BS is None else {"selected_positions": positions_BS}
    if online:
        extra = {"selection": config.selection.to_rule(), "selection_keys": ids[:, 0]}
    decoder.body.register_forward_pre_hook(lambda module, args: _enter_body(ledger))
    decoder.body.register_forward_hook(lambda module, args, output: _enter_head(ledger, output))
    precision = _PRECISIONS.get(config.training.mixed_precision)
    autocasts = precision and not engine.is_deepspeed
    saved = saved_tensors_hooks(lambda tensor: _save(ledger, tensor), lambda tensor: tensor)
    # As from the collator, with the count that Trainer hands on.
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, num_items_in_batch=ids.numel())
    casting: AbstractContextManager[Any] = torch.autocast("cpu", precision) if autocasts else nullcontext()
    with saved, casting:
        output = model(**inputs, **extra)
    loss = (convert_to_fp32(output) if autocasts else output)["loss"]
    del output
    with state.backward_pass():
        loss.backward()


def _track_stored_kv(ledger: Ledger, kind: str, copies: tuple[torch.Tensor, ...]) -> None:
    """Copies of keys and values for the backward pass are counted as such, and on the host not at all."""
    ledger.track(copies, None if kind == "host" else "keys_values")


def _few_tiles(work: Work, all_tiles: list[tiles.Tile]) -> Iterator[tiles.Tile]:
    """Of a layer's tiles the first, one in the middle, which stands for all but two, and the last.

    Arithmetic grows evenly from tile to tile, so that the sum is that of all; and the last holds the most.
    """
    between = len(all_tiles) - 2
    first, middle, last = all_tiles[0], all_tiles[len(all_tiles) // 2], all_tiles[-1]
    for tile in all_tiles if between < 2 else (first, middle, last):
        work.times = between if between >= 2 and tile is middle else 1
        yield tile
    work.times = 1


@contextmanager
def _masks_as_of_real_tensors() -> Iterator[None]:
    """Transformers asks nothing of tensors without data, and builds the largest masks then, which no real batch has."""
    before = masking_utils.is_tracing
    masking_utils.is_tracing = lambda *args: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before


def _enter_body(ledger: Ledger) -> None:
    ledger.region = "workspace"


def _enter_head(ledger: Ledger, body_output: Any) -> None:
    """From here to the gradient of the body's output, what is born belongs to the head."""
    ledger.region = "logits"

    def leave(gradient: torch.Tensor) -> None:
        ledger.region = "workspace"

    hidden = body_output[0]
    if hidden.requires_grad:
        hidden.register_hook(leave)


def _save(ledger: Ledger, tensor: torch.Tensor) -> torch.Tensor:
    if ledger.category_of(tensor) == "workspace":
        ledger.track([tensor], "activations")
    return tensor


def _optimizer(config: RunConfig, engine: Engine) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """The optimizer that Trainer would make, as a function of its parameters."""

    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(config.training.model_copy(update={"mixed_precision": "no"}), Path(folder), 0)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    if not kind.__module__.startswith(("torch.", "transformers.")):
        raise UserError(
            f"training.optim: {config.training.optim} cannot be planned, since its kernels need their device; plan "
            "with adamw_torch, whose states take 8 bytes per trained weight, and correct for yours."
        )
    # Fused on a GPU, as `training_arguments` has it there.
    is_fused = options.get("fused") or config.training.optim == "adamw_torch"
    if not engine.on_cpu and not is_fused and "foreach" in kind.__init__.__code__.co_varnames:
        options["foreach"] = True  # what torch chooses on a GPU; it needs the memory of the gradients once more
    return lambda parameters: kind(parameters, **options)


class _LargestBatch(TorchDispatchMode):
    """What code asks of a tensor's data, answered for a batch without padding in which every token carries a loss.

    Results whose size depends on data get the largest that they can have, and a question of truth ("is nothing
    padded?", "is this no packing of several examples?") is answered yes.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked more often than all else together
            return _CPU
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            for tensor in args[1:3]:
                # A view of something larger (queries, keys and values in one) is left where it is.
                if tensor.untyped_storage().nbytes() <= 1.5 * tensor.nbytes:
                    self.ledger.track([tensor], "keys_values")
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))
