"""`tokenseek train`: from a configuration to a fine-tuned model or adapter, scoring first where no index exists."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
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
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import TrainOutput, set_seed

from tokenseek.config import RunConfig
from tokenseek.data import StreamedExamples, hold_out, prepare_dataset, require_supervised, stream_examples
from tokenseek.data.packing import PackedDataset
from tokenseek.decoder.find import find_causal_lm
from tokenseek.ditching import Seeking, enable_token_ditching
from tokenseek.index import TokenIndex
from tokenseek.launching.memory import peak_memory_bytes
from tokenseek.launching.processes import first_on_main, join_processes, log_once, require_engine
from tokenseek.models.adapters import add_adapter
from tokenseek.models.checks import require_adapter, require_fitting_data
from tokenseek.models.files import model_folder, revision_of
from tokenseek.models.kernels import apply_liger, compile_regions, require_kernels
from tokenseek.models.loading import load_model, packing_dtype
from tokenseek.parallel import enable_sequence_parallelism, sequence_group
from tokenseek.runs.allocation import StepAllocation
from tokenseek.runs.exact import fit_exact_layers, settle_exact_layers
from tokenseek.runs.export import write_model_card
from tokenseek.runs.fingerprint import fingerprint_run
from tokenseek.runs.fit import settle_memory, with_batch
from tokenseek.runs.hub import push, require_hub
from tokenseek.runs.inputs import RunInputs, read_inputs
from tokenseek.runs.outline import log_outline
from tokenseek.runs.prompts import render_prompts, require_samples
from tokenseek.runs.ratio import settle_ratio
from tokenseek.runs.resume import (
    METRICS_NAME,
    SUMMARY_NAME,
    Start,
    describe_start,
    find_start,
    require_same_inputs,
    write_start,
)
from tokenseek.runs.score import score
from tokenseek.runs.summary import Selected, TrainingSummary, card_rows
from tokenseek.training import GroupTrainer, PaddingCollator, TokenSeekCollator, TokenSeekTrainer
from tokenseek.training.arguments import training_arguments
from tokenseek.training.checkpoints import Resumed, fit_checkpoint
from tokenseek.training.checks import make_output, require_a_batch, require_arguments, require_reports
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
    timer = _Timer(trainer, run.held_out, loss_before)
    trainer.add_callback(timer)
    checkpoint = run.start.checkpoint
    if checkpoint:
        trainer.add_callback(Resumed(Path(checkpoint)))
    with StepAllocation(trainer, run.config.training.compile) as allocation:
        trainer.add_callback(allocation)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    return finish(run, trainer, timer, selected, allocation, result)


@dataclass(frozen=True)
class Run:
    """A training run whose configuration, data and index are checked and made; no weight is loaded yet.

    Attributes:
        config: with a number for `selection.ratio`.
        training: the examples to train on, without those that are held out.
        packed: the same as rows of several examples, where the run packs them.
        stream: the examples to train on where they are streamed; `training` then holds the first of them.
        index: None where no score is needed before training.
        start: what is left to do, and from where.
    """

    config: RunConfig
    inputs: RunInputs
    training: Dataset
    held_out: Dataset | None
    packed: PackedDataset | None
    stream: StreamedExamples | None
    index: TokenIndex | None
    arguments: TrainingArguments
    output: Path
    start: Start


def prepare(config: RunConfig, *, outlined: bool = False) -> Run:
    """Everything that can be refused before weights are loaded, and the index, which is made where there is none.

    Of a run that is finished already, no more than is needed to know that.
    """
    config.require_trainable()
    state = join_processes()
    require_engine(state, config.model.quantization)
    require_kernels(config)
    auto = config.selection.exact_layers == "auto"
    config = settle_exact_layers(config, state)
    output = Path(config.output_dir)
    make_output(output)
    start = find_start(config.training.resume, output)
    group = sequence_group(state.device.type)
    require_reports(config.training.report_to)
    require_samples(config, state, shares_texts=group is not None)
    packs, ditches = bool(config.training.packing), config.training.ditching
    inputs = read_inputs(config, state, group, packing=packs, ditching=ditches)
    config = fit_exact_layers(config, inputs.skeleton, state, auto=auto)
    auto_batch = config.training.per_device_train_batch_size == "auto"
    require_arguments(with_batch(config, 1) if auto_batch else config, inputs.skeleton)
    planned_model = require_adapter(inputs.skeleton, config.peft) if config.peft else inputs.skeleton
    training, held_out = _split(config, inputs)
    log_once(_log, state, f"Training data: {inputs.data.report}")
    packed, longest = None, max(map(len, inputs.data.dataset["input_ids"]))
    if config.training.packing == "bins":
        packed, longest = PackedDataset(training, config.data.max_length), config.data.max_length
        log_once(_log, state, f"Packed: {packed}.")
    if config.data.is_streamed:
        longest = config.data.max_length
    config, plan = settle_memory(config, start.settled_by, longest, state)
    config = settle_ratio(config, start.settled_by, longest, state)
    groups = state.num_processes // (group.size() if group else 1)
    require_a_batch(config.training, len(training), groups)
    fingerprint = fingerprint_run(config, inputs, training, held_out, groups)
    start = require_same_inputs(start, fingerprint)
    if told := describe_start(start, fingerprint):
        log_once(_log, state, told)
    arguments = training_arguments(config.training, output, config.seed)
    if arguments.world_size != state.num_processes:
        raise RuntimeError(f"Trainer sees {arguments.world_size} processes of the {state.num_processes} launched.")
    if start.finished:
        return Run(config, inputs, training, held_out, packed, None, None, arguments, output, start)
    first_on_main(state, lambda: require_hub(config))
    if outlined:
        log_outline(config, inputs, training, planned_model, longest, plan)
    index = _index(config, inputs) if config.needs_index else None
    if start.checkpoint:
        fit_checkpoint(Path(start.checkpoint), arguments, state)
    write_start(start, config, fingerprint, state)
    stream = _stream(config, inputs, arguments, start, groups) if config.data.is_streamed else None
    return Run(config, inputs, training, held_out, packed, stream, index, arguments, output, start)


def _stream(
    config: RunConfig, inputs: RunInputs, arguments: TrainingArguments, start: Start, groups: int
) -> StreamedExamples:
    """The examples of this process from where the run starts. Trainer and accelerate leave them as they come."""
    cast(AcceleratorConfig, arguments.accelerator_config).dispatch_batches = False
    arguments.ignore_data_skip = True
    training, state, taken = config.training, inputs.state, 0
    if start.checkpoint:
        steps = TrainerState.load_from_json(str(Path(start.checkpoint) / TRAINER_STATE_NAME)).global_step
        taken = steps * training.micro_batch * training.gradient_accumulation_steps * groups
    part = state.process_index // (state.num_processes // groups)
    return stream_examples(config.data, inputs.tokenizer, part=part, parts=groups, skip=taken)


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
    options: dict[str, Any] = dict(
        args=run.arguments,
        on_nan=config.training.on_nan,
        token_mean=True,
        train_dataset=next(data for data in (run.stream, run.packed, run.training) if data is not None),
        eval_dataset=run.held_out,
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
        selected = Selected.among(TokenSeekCollator(None, rule="all"), run.training)
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
        selected = Selected.among(collator, run.training)
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
    after = held_out_loss(trainer, run.held_out) if run.held_out else None
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
    if state.is_main_process:
        (run.output / SUMMARY_NAME).write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
        write_model_card(final, run.config, card_rows(summary, None if run.stream else len(run.training)))
        if run.config.training.push_to_hub:
            _log.info(f"on the hub: {push(run.config, final)}")
        _log.info(summary.report(run.output))
    state.wait_for_everyone()
    return summary


def _split(config: RunConfig, inputs: RunInputs) -> tuple[Dataset, Dataset | None]:
    """Examples to train on, and those of the held-out loss; both have tokens with a loss."""
    training, held_out, section = inputs.data.dataset, None, "eval_data"
    if config.data.hold_out:
        training, held_out = hold_out(training, config.data.hold_out, config.data.seed)
        if not config.eval_data:
            section = "data.hold_out"
    elif (evaluated := config.eval_data) is not None:
        prepared = first_on_main(inputs.state, lambda: prepare_dataset(evaluated, inputs.tokenizer, section))
        held_out = prepared.dataset
    require_supervised(training, "data")
    if held_out is not None:
        require_supervised(held_out, section)
        if section == "eval_data":
            require_fitting_data(inputs.skeleton, inputs.tokenizer, held_out, section)
    return training, held_out


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
        exact_layers = cast(int, config.selection.exact_layers)  # `prepare` has settled `auto`
        seeking = Seeking(scoring.reduction, scoring.gradient_layer, exact_layers)
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


def _index(config: RunConfig, inputs: RunInputs) -> TokenIndex:
    path, state = config.index_path, inputs.state
    if not path.exists():
        log_once(_log, state, f"There is no index at {path}: scoring the data first.")
        score(config, inputs)

    def open_index() -> TokenIndex:
        index = TokenIndex.open(path, verify=state.is_main_process)  # one process reads every byte, the others trust it
        index.require(inputs.fingerprints)
        return index

    return first_on_main(state, open_index)


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
