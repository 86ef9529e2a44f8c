"""`tokenseek train`: from a prepared run to a fine-tuned model or adapter."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, set_seed

from tokenseek.config import RunConfig
from tokenseek.decoder.find import find_causal_lm
from tokenseek.ditching import Seeking, enable_token_ditching
from tokenseek.launching.memory import peak_memory_bytes
from tokenseek.launching.processes import first_on_main, log_once, meet
from tokenseek.models.adapters import add_adapter
from tokenseek.models.files import model_folder, revision_of
from tokenseek.models.kernels import apply_liger, compile_regions
from tokenseek.models.loading import load_model, packing_dtype
from tokenseek.parallel import enable_sequence_parallelism
from tokenseek.runs.allocation import StepAllocation
from tokenseek.runs.export import write_model_card
from tokenseek.runs.hub import push
from tokenseek.runs.preparation import Run, prepare
from tokenseek.runs.prompts import render_prompts
from tokenseek.runs.resume import METRICS_NAME, SUMMARY_NAME
from tokenseek.runs.summary import Selected, TrainingSummary, card_rows
from tokenseek.training import GroupTrainer, PaddingCollator, TokenSeekCollator, TokenSeekTrainer
from tokenseek.training.checkpoints import Resumed
from tokenseek.training.held_out import held_out_loss
from tokenseek.training.metrics import MetricsFile
from tokenseek.training.progress import ProgressLine
from tokenseek.training.samples import Samples

_log = logging.getLogger(__name__)


def train(config: RunConfig, loss_before: float | None = None, *, outlined: bool = False) -> TrainingSummary:
    """Fine-tune as configured; every process of a run calls this. A finished run is not run again.

    Args:
        loss_before: the held-out loss of the model as it is, where it was measured before.
        outlined: log an example, what is trained, the planned memory and the output folder before it starts.

    Raises:
        UserError: before the model is loaded, for a configuration, data or an index that does not fit.
    """
    run = prepare(config, outlined=outlined)
    if run.start.finished and run.start.summary:
        return run.start.summary
    trainer, selected = build(run)
    timer = _Timer(trainer, run.examples.held_out, loss_before)
    trainer.add_callback(timer)
    checkpoint = run.start.checkpoint
    if checkpoint:
        trainer.add_callback(Resumed(Path(checkpoint)))
    with StepAllocation(trainer, run.config.training.compile) as allocation:
        trainer.add_callback(allocation)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    return finish(run, trainer, timer, selected, allocation, result)


def build(run: Run) -> tuple[GroupTrainer, Selected | None]:
    """The model and its trainer, and what is selected of the first examples where that is known before training."""
    config, inputs, tokenizer = run.config, run.inputs, run.inputs.tokenizer
    # Under ZeRO-3 the arguments, which are made before, decide that weights are partitioned as they are loaded.
    set_seed(config.seed)
    packed_in = packing_dtype(config)
    if config.model.quantization and packed_in != torch.uint8:
        numbers = f"{config.model.quantization} weights, packed in {str(packed_in).removeprefix('torch.')} numbers"
        log_once(_log, inputs.state, f"The engine splits {numbers}, over {inputs.state.num_processes} processes.")
    model = _model(config, inputs.group, packed_in)
    meet(inputs.state)  # engines deal the weights out in collectives, and some processes may read them for long
    options: dict[str, Any] = dict(
        args=run.arguments,
        on_nan=config.training.on_nan,
        token_mean=True,
        train_dataset=next(
            data for data in (run.stream, run.examples.packed, run.examples.training) if data is not None
        ),
        eval_dataset=run.examples.held_out,
        processing_class=tokenizer,
        callbacks=[metrics := MetricsFile(run.output / METRICS_NAME), ProgressLine()],
    )
    trainer, selected = _trainer(run, model, options)
    for printed in (PrinterCallback, ProgressCallback):  # whose place the progress line has
        trainer.remove_callback(printed)
    if patience := config.training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(patience))
    if prompts := config.training.sample_prompts:
        texts = render_prompts(config.data, prompts, tokenizer)
        trainer.add_callback(Samples(trainer, tokenizer, prompts, texts, metrics))
    return trainer, selected


def _trainer(
    run: Run, model: PreTrainedModel | PeftModel, options: dict[str, Any]
) -> tuple[GroupTrainer, Selected | None]:
    config, inputs, tokenizer = run.config, run.inputs, run.inputs.tokenizer
    selected: Selected | None = None
    if not config.training.ditching:
        selected = Selected.among(TokenSeekCollator(None, rule="all"), run.examples.training)
        return GroupTrainer(model, data_collator=PaddingCollator(tokenizer.pad_token_id), **options), selected
    online, rule = config.scoring.mode == "online", config.selection.to_rule()
    collator = TokenSeekCollator(
        run.index,
        rule=rule,
        pad_token_id=tokenizer.pad_token_id,
        packing=bool(config.training.packing),
        online=online,
    )
    if online:
        log_once(
            _log, inputs.state, f"Selection in each step, rule {rule.rule}: {rule.ratio:g} of the tokens, no index."
        )
    else:
        selected = Selected.among(collator, run.examples.training)
        log_once(_log, inputs.state, selected.report())
    return TokenSeekTrainer(model, data_collator=collator, **options), selected


def finish(
    run: Run,
    trainer: GroupTrainer,
    timer: _Timer,
    selected: Selected | None,
    allocation: StepAllocation,
    result: TrainOutput,
) -> TrainingSummary:
    """Measure what was learned, save it, and write the summary and the model card."""
    state = run.inputs.state
    peak = int(max_over_processes(trainer, peak_memory_bytes()))
    average, step_peak = (int(max_over_processes(trainer, n)) or None for n in (allocation.average, allocation.peak))
    after = held_out_loss(trainer, run.examples.held_out) if run.examples.held_out else None
    selected = selected or Selected.by_steps(cast(TokenSeekTrainer, trainer))
    if run.config.training.load_best and trainer.state.best_global_step:
        log_once(_log, state, f"Lowest held-out loss at step {trainer.state.best_global_step:,}; its weights are kept.")
    final = run.output / "final"
    trainer.save_model(str(final))
    if state.is_main_process:
        (final / TRAINING_ARGS_NAME).unlink()  # a pickle, and all that it says is in config.yaml
    summary = TrainingSummary(
        steps=result.global_step,
        tokens=timer.tokens,
        seconds=round(timer.seconds, 3),
        tokens_per_second=round(timer.tokens / timer.seconds, 1) if timer.seconds else 0.0,
        peak_memory_bytes=peak,
        average_memory_bytes=average,
        step_peak_bytes=step_peak,
        train_loss=result.training_loss,
        loss_before=timer.loss_before,
        loss_after=after,
        trainable_parameters=trainer.get_num_trainable_parameters(),
        selected_share=selected.selected / selected.tokens,
        supervised_share=selected.supervised / selected.selected,
        final=str(final),
    )
    first_on_main(state, lambda: _publish(run, summary, final))
    return summary


def _publish(run: Run, summary: TrainingSummary, final: Path) -> None:
    """Write what the run came to, and upload it where that is asked for; the main process does."""
    if not run.inputs.state.is_main_process:
        return
    (run.output / SUMMARY_NAME).write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    write_model_card(final, run.config, card_rows(summary, None if run.stream else len(run.examples.training)))
    if run.config.training.push_to_hub:
        _log.info(f"on the hub: {push(run.config, final)}")
    _log.info(summary.report(run.output))


def _model(config: RunConfig, group: dist.ProcessGroup | None, packed_in: torch.dtype) -> PreTrainedModel | PeftModel:
    """The model as the run trains it: with its adapter, its ditching and its ranks that share texts."""
    base = load_model(config.model, packed_in=packed_in)
    revision = revision_of(config.model, model_folder(config.model))
    model = add_adapter(base, config.peft, revision=revision) if config.peft else base
    if config.training.liger:
        apply_liger(find_causal_lm(model))
    if config.training.compile:
        compile_regions(model)
    if config.training.ditching:
        scoring, training = config.scoring, config.training
        seeking = Seeking(scoring.reduction, scoring.gradient_layer, config.selection.wanted_exact_layers)
        enable_token_ditching(
            model,
            recompute=training.recompute is True,  # `prepare` has settled `auto`
            kv_storage=training.kv_storage,
            tile_rows=training.tile_rows,
            seeking=seeking,
        )
    if group is not None:
        enable_sequence_parallelism(model, group, layout=config.training.sequence_layout)
    return model


def max_over_processes(trainer: GroupTrainer, value: int) -> float:
    """The largest of the values that the processes give."""
    values = torch.tensor([value], dtype=torch.int64, device=trainer.args.device)
    return trainer.accelerator.gather(values).max().item()


class _Timer(TrainerCallback):
    """Seconds and tokens of the training steps, and the held-out loss before the first."""

    def __init__(self, trainer: GroupTrainer, held_out: Dataset | None, loss_before: float | None) -> None:
        self.trainer, self.held_out, self.loss_before = trainer, held_out, loss_before
        self.seconds, self.tokens = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.held_out and state.global_step == 0:
            before = held_out_loss(self.trainer, self.held_out) if self.loss_before is None else self.loss_before
            self.loss_before = before
            self.trainer.log({"held_out_loss": before})
        self._tokens_before = state.num_input_tokens_seen

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.tokens = state.num_input_tokens_seen - self._tokens_before
