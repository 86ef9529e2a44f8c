"""`tokenseek train`: from a configuration to a fine-tuned model or adapter, scoring first where no index exists."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed

from tokenseek.config.schema import RunConfig, save_resolved
from tokenseek.data import PreparedData, hold_out, prepare_dataset, require_supervised
from tokenseek.data.packing import PackedDataset
from tokenseek.ditching import enable_token_ditching
from tokenseek.ditching.online import Seeking
from tokenseek.errors import UserError
from tokenseek.index import TokenIndex
from tokenseek.labels import IGNORED
from tokenseek.launching.memory import peak_memory_bytes
from tokenseek.launching.processes import first_on_main, join_processes, require_engine
from tokenseek.models.loading import add_adapter, load_model, load_tokenizer, require_decoder
from tokenseek.parallel import enable_sequence_parallelism, sequence_group
from tokenseek.runs.exact import settle_exact_layers
from tokenseek.runs.export import write_model_card
from tokenseek.runs.ratio import settle_ratio
from tokenseek.runs.score import run_fingerprints, score
from tokenseek.training import GroupTrainer, PaddingCollator, TokenSeekCollator, TokenSeekTrainer
from tokenseek.training.arguments import training_arguments
from tokenseek.training.checkpoints import Resumed, fit_checkpoint
from tokenseek.training.metrics import MetricsFile, held_out_loss


@dataclass(frozen=True)
class TrainingSummary:
    """What a run did; written to ``summary.json``.

    Attributes:
        tokens: that went through the model, padding not counted, in all processes.
        seconds: of the training steps alone, without loading, scoring and evaluation.
        peak_memory_bytes: of the busiest process while it trained: allocated on its GPU, or resident on a CPU.
        loss_before, loss_after: held-out loss in nats per token; None without `eval_data` (before: or when resumed).
        selected_share: selected tokens of all tokens, in the first examples; 1 without ditching.
        supervised_share: of those, the tokens that carry a loss.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    train_loss: float
    loss_before: float | None
    loss_after: float | None
    trainable_parameters: int
    selected_share: float
    supervised_share: float
    final: str


def train(config: RunConfig, loss_before: float | None = None) -> TrainingSummary:
    """Fine-tune as configured; every process of a run calls this.

    Args:
        loss_before: the held-out loss of the model as it is, where it was measured before.

    Raises:
        UserError: before the model is loaded, for a configuration, data or an index that does not fit.
    """
    config.require_trainable()
    state = join_processes()
    require_engine(state, config.model.quantization)
    config = settle_exact_layers(config, state)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = _checkpoint(config, output)
    group = sequence_group(state.device.type)
    if group is not None and config.scoring.mode == "online" and config.training.packing:
        raise UserError(
            "training.packing with scoring.mode: online is incompatible with sequence parallelism (sp_size); leave one "
            "of them out."
        )
    require_decoder(config.model, packing=bool(config.training.packing), group=group)
    tokenizer = load_tokenizer(config.model)
    prepared = first_on_main(state, lambda: prepare_dataset(config.data, tokenizer))
    training, held_out = prepared.dataset, None
    if config.data.hold_out:
        training, held_out = hold_out(training, config.data.hold_out, config.data.seed)
    elif config.eval_data:
        held_out = first_on_main(state, lambda: prepare_dataset(config.eval_data, tokenizer, "eval_data")).dataset
    require_supervised(training, "data")
    if held_out is not None:
        require_supervised(held_out, "eval_data" if config.eval_data else "data.hold_out")
    state.print(f"Training data: {prepared.report}")
    longest = max(map(len, prepared.dataset["input_ids"]))
    rows = None
    if config.training.packing == "bins":
        rows, longest = PackedDataset(training, config.data.max_length), config.data.max_length
        state.print(f"Packed: {rows}.")
    config = settle_ratio(config, checkpoint, longest, state)
    if state.is_main_process:
        save_resolved(config, output / "config.yaml")
    rule = config.selection.to_rule()
    index = _index(config, prepared, state) if config.needs_index else None

    # Before the model: under ZeRO-3 these arguments decide that weights are partitioned as they are loaded.
    arguments = training_arguments(config.training, output, config.seed)
    if arguments.world_size != state.num_processes:
        raise RuntimeError(f"Trainer sees {arguments.world_size} processes of the {state.num_processes} launched.")
    if checkpoint:
        fit_checkpoint(Path(checkpoint), arguments, state)
    set_seed(config.seed)
    model = load_model(config.model)
    if config.peft:
        model = add_adapter(model, config.peft)
    if config.training.ditching:
        scoring = config.scoring
        seeking = Seeking(scoring.reduction, scoring.gradient_layer, config.selection.exact_layers)
        enable_token_ditching(
            model, recompute=config.training.recompute, kv_storage=config.training.kv_storage, seeking=seeking
        )
    if group is not None:
        enable_sequence_parallelism(model, group, layout=config.training.sequence_layout)
    common = dict(
        args=arguments,
        on_nan=config.training.on_nan,
        train_dataset=training if rows is None else rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[MetricsFile(output / "metrics.jsonl")],
    )
    if config.training.ditching:
        online = config.scoring.mode == "online"
        options = dict(pad_token_id=tokenizer.pad_token_id, packing=bool(config.training.packing), online=online)
        collator = TokenSeekCollator(index, rule=rule, **options)
        selection = None
        if online:
            state.print(f"Selection in each step, rule {rule.rule}: {rule.ratio:g} of the tokens, no index.")
        else:
            selection = Selected.among(collator, training)
            state.print(selection.report())
        trainer = TokenSeekTrainer(model, data_collator=collator, **common)
    else:
        selection = Selected.among(TokenSeekCollator(None, rule="all"), training)
        trainer = GroupTrainer(model, data_collator=PaddingCollator(tokenizer.pad_token_id), **common)
    timer = _Timer(trainer, held_out, loss_before)
    trainer.add_callback(timer)
    if checkpoint:
        trainer.add_callback(Resumed(Path(checkpoint)))

    result = trainer.train(resume_from_checkpoint=checkpoint)
    peak = int(state_max(trainer, peak_memory_bytes()))
    after = held_out_loss(trainer, held_out) if held_out else None
    if selection is None:
        selection = Selected.by_steps(trainer)
    final = output / "final"
    trainer.save_model(str(final))
    if state.is_main_process:
        (final / TRAINING_ARGS_NAME).unlink()  # a pickle, and all that it says is in config.yaml
    summary = TrainingSummary(
        steps=result.global_step,
        tokens=timer.tokens,
        seconds=round(timer.seconds, 3),
        tokens_per_second=round(timer.tokens / timer.seconds, 1) if timer.seconds else 0.0,
        peak_memory_bytes=peak,
        train_loss=result.training_loss,
        loss_before=timer.loss_before,
        loss_after=after,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        selected_share=selection.selected / selection.tokens,
        supervised_share=selection.supervised / selection.selected,
        final=str(final),
    )
    if state.is_main_process:
        (output / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
        write_model_card(final, config, _card_rows(summary, len(training)))
    state.wait_for_everyone()
    return summary


def _checkpoint(config: RunConfig, output: Path) -> str | None:
    resume = config.training.resume
    if resume == "never":
        return None
    if resume == "auto":
        # A checkpoint that was being written when the run was killed has no state, which is written last.
        whole = [path.parent for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
        return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
    if not Path(resume, TRAINER_STATE_NAME).is_file():
        raise UserError(
            f"training.resume: {resume} is no checkpoint (no {TRAINER_STATE_NAME} in it); accepted are 'auto', 'never' "
            f"or the path of a checkpoint such as {output}/checkpoint-500."
        )
    return resume


def _index(config: RunConfig, prepared: PreparedData, state: PartialState) -> TokenIndex:
    path = config.index_path
    if not path.exists():
        state.print(f"There is no index at {path}: scoring the data first.")
        score(config, prepared)

    def open_index() -> TokenIndex:
        index = TokenIndex.open(path, verify=state.is_main_process)  # one process reads every byte, the others trust it
        index.require(run_fingerprints(config, prepared))
        return index

    return first_on_main(state, open_index)


@dataclass(frozen=True)
class Selected:
    """How many tokens of the first examples are selected, and how many of those carry a loss."""

    examples: int
    tokens: int
    selected: int
    supervised: int

    @classmethod
    def among(cls, collator: TokenSeekCollator, dataset: Dataset, examples: int = 256) -> Selected:
        first = dataset.select(range(min(examples, len(dataset))))
        selected = supervised = 0
        for example in first:
            batch = collator([example])
            selected += batch["selected_positions"].shape[1]
            supervised += int(batch["shift_labels"].ne(IGNORED).sum())
        return cls(len(first), sum(map(len, first["input_ids"])), selected, supervised)

    @classmethod
    def by_steps(cls, trainer: TokenSeekTrainer) -> Selected:
        """Of the steps of a run that selected their tokens themselves, over all processes."""
        counts = torch.tensor(
            [int(n) for n in (trainer.online.tokens, trainer.online.selected, trainer.online.supervised)]
        )
        counts = trainer.accelerator.reduce(counts.to(trainer.args.device), reduction="sum").tolist()
        tokens, selected, supervised = (max(1, count) for count in counts)
        return cls(0, tokens, selected, supervised)

    def report(self) -> str:
        report = (
            f"Selection in the first {self.examples} examples: {self.selected:,} of {self.tokens:,} tokens, "
            f"{self.supervised / self.selected:.0%} of which carry a loss."
        )
        if not self.supervised:
            report += (
                "\nWARNING: no selected token carries a loss, so that nothing is learned from them. Raise "
                "selection.ratio or selection.beta, or set selection.scope=supervised."
            )
        return report


def state_max(trainer: GroupTrainer, value: int) -> float:
    values = torch.tensor([value], dtype=torch.int64, device=trainer.args.device)
    return trainer.accelerator.gather(values).max().item()


class _Timer(TrainerCallback):
    """Seconds and tokens of the training steps, and the held-out loss before the first."""

    def __init__(self, trainer: GroupTrainer, held_out: Dataset | None, loss_before: float | None):
        self.trainer, self.held_out, self.loss_before = trainer, held_out, loss_before
        self.seconds, self.tokens = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if self.held_out and state.global_step == 0:
            if self.loss_before is None:
                self.loss_before = held_out_loss(self.trainer, self.held_out)
            self.trainer.log({"held_out_loss": self.loss_before})
        self._tokens_before = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._began
        self.tokens = state.num_input_tokens_seen - self._tokens_before


def _card_rows(summary: TrainingSummary, examples: int) -> dict[str, str]:
    rows = {
        "examples": f"{examples:,}",
        "optimizer steps": f"{summary.steps:,}",
        "trainable parameters": f"{summary.trainable_parameters:,}",
        "tokens per second": f"{summary.tokens_per_second:,.0f}",
        "peak memory per process": f"{summary.peak_memory_bytes / 2**30:.2f} GiB",
    }
    for name, loss in (("before", summary.loss_before), ("after", summary.loss_after)):
        if loss is not None:
            rows[f"held-out loss {name}"] = f"{loss:.4f} nats per token (perplexity {math.exp(loss):.2f})"
    return rows
