"""Everything that a training run needs before its model is loaded: settings, data, index, and where it starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import AcceleratorConfig

from tokenseek.config import RunConfig
from tokenseek.data import StreamedExamples, hold_out, prepare_dataset, require_supervised, stream_examples
from tokenseek.data.packing import PackedDataset
from tokenseek.index import TokenIndex
from tokenseek.launching.processes import first_on_main, join_processes, log_once, require_engine
from tokenseek.models.checks import require_adapter, require_fitting_data
from tokenseek.models.kernels import require_kernels
from tokenseek.parallel import sequence_group
from tokenseek.runs.exact import fit_exact_layers, settle_exact_layers
from tokenseek.runs.fingerprint import fingerprint_run
from tokenseek.runs.fit import settle_memory, with_batch
from tokenseek.runs.hub import require_hub
from tokenseek.runs.inputs import RunInputs, read_inputs
from tokenseek.runs.outline import log_outline
from tokenseek.runs.prompts import require_samples
from tokenseek.runs.ratio import settle_ratio
from tokenseek.runs.resume import Start, describe_start, find_start, require_same_inputs, write_start
from tokenseek.runs.score import require_scores, score
from tokenseek.training.arguments import training_arguments
from tokenseek.training.checkpoints import fit_checkpoint
from tokenseek.training.checks import make_output, require_a_batch, require_arguments, require_reports

_log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """The examples of a run.

    Attributes:
        training: those to train on, without those that are held out; of streamed data the first of them.
        held_out: those of the held-out loss.
        packed: the training ones as rows of several examples, where the run packs them so.
        longest: tokens of the longest row of a batch.
    """

    training: Dataset
    held_out: Dataset | None
    packed: PackedDataset | None
    longest: int


@dataclass(frozen=True)
class Run:
    """A training run whose configuration, data and index are checked and made; no weight is loaded yet.

    Attributes:
        config: without `auto`.
        start: what is left to do, and from where.
        index: None where no score is needed before training.
        stream: the examples to train on where they are streamed.
    """

    config: RunConfig
    inputs: RunInputs
    examples: Examples
    arguments: TrainingArguments
    output: Path
    start: Start
    index: TokenIndex | None = None
    stream: StreamedExamples | None = None


def prepare(config: RunConfig, *, outlined: bool = False) -> Run:
    """Everything that can be refused before weights are loaded, and the index, which is made where there is none.

    Of a run that is finished already, no more than is needed to know that.
    """
    config.require_trainable()
    state = join_processes()
    require_engine(state, config.model.quantization)
    require_kernels(config)
    auto_exact = config.selection.exact_layers == "auto"
    config = settle_exact_layers(config, state)
    output = Path(config.output_dir)
    make_output(output)
    start = find_start(config.training.resume, output)
    group = sequence_group(state.device.type)
    require_reports(config.training.report_to)
    require_samples(config, state, shares_texts=group is not None)

    packs, ditches = bool(config.training.packing), config.training.ditching
    inputs = read_inputs(config, state, group, packing=packs, ditching=ditches)
    config = fit_exact_layers(config, inputs.skeleton, state, auto=auto_exact)
    auto_batch = config.training.per_device_train_batch_size == "auto"
    require_arguments(with_batch(config, 1) if auto_batch else config, inputs.skeleton)
    planned_model = require_adapter(inputs.skeleton, config.peft) if config.peft else inputs.skeleton
    examples = _examples(config, inputs)
    config, plan = settle_memory(config, start.settled_by, examples.longest, state)
    config = settle_ratio(config, start.settled_by, examples.longest, state)

    groups = state.num_processes // (group.size() if group else 1)
    require_a_batch(config.training, len(examples.training), groups)
    fingerprint = fingerprint_run(config, inputs, examples.training, examples.held_out, groups)
    start = _start(start, fingerprint, state)
    run = Run(config, inputs, examples, _arguments(config, output, state), output, start)
    if start.finished:
        return run
    first_on_main(state, lambda: require_hub(config))
    if outlined:  # with a plan, if none was made before
        outline = config, inputs, examples.training, planned_model, examples.longest, plan
        first_on_main(state, lambda: log_outline(*outline))
    index = _index(config, inputs) if config.needs_index else None
    if start.checkpoint:
        fit_checkpoint(Path(start.checkpoint), run.arguments, state)
    write_start(start, config, fingerprint, state)
    return replace(run, index=index, stream=_stream(run, groups) if config.data.is_streamed else None)


def _examples(config: RunConfig, inputs: RunInputs) -> Examples:
    training, held_out = _split(config, inputs)
    log_once(_log, inputs.state, f"Training data: {inputs.data.report}")
    packed, longest = None, max(map(len, inputs.data.dataset["input_ids"]))
    if config.training.packing == "bins":
        packed, longest = PackedDataset(training, config.data.max_length), config.data.max_length
        log_once(_log, inputs.state, f"Packed: {packed}.")
    if config.data.is_streamed:
        longest = config.data.max_length
    return Examples(training, held_out, packed, longest)


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


def _start(start: Start, fingerprint: dict[str, Any], state: PartialState) -> Start:
    """`start` after the comparison with the run that is resumed there; logs what a user should know of it."""
    start = require_same_inputs(start, fingerprint)
    if told := describe_start(start, fingerprint):
        log_once(_log, state, told)
    return start


def _arguments(config: RunConfig, output: Path, state: PartialState) -> TrainingArguments:
    arguments = training_arguments(config.training, output, config.seed)
    if arguments.world_size != state.num_processes:
        raise RuntimeError(f"Trainer sees {arguments.world_size} processes of the {state.num_processes} launched.")
    return arguments


def _index(config: RunConfig, inputs: RunInputs) -> TokenIndex:
    path, state = config.index_path, inputs.state
    if not path.exists():
        log_once(_log, state, f"There is no index at {path}: scoring the data first.")
        score(config, inputs)

    def open_index() -> TokenIndex:
        index = TokenIndex.open(path, verify=state.is_main_process)  # one process reads every byte, the others trust it
        index.require(inputs.fingerprints)
        require_scores(index, config)
        return index

    return first_on_main(state, open_index)


def _stream(run: Run, groups: int) -> StreamedExamples:
    """The examples of this process from where the run starts. Trainer and accelerate leave them as they come."""
    cast(AcceleratorConfig, run.arguments.accelerator_config).dispatch_batches = False
    run.arguments.ignore_data_skip = True
    training, state, taken = run.config.training, run.inputs.state, 0
    if run.start.checkpoint:
        steps = TrainerState.load_from_json(str(Path(run.start.checkpoint) / TRAINER_STATE_NAME)).global_step
        taken = steps * training.micro_batch * training.gradient_accumulation_steps * groups
    part = state.process_index // (state.num_processes // groups)
    return stream_examples(run.config.data, run.inputs.tokenizer, part=part, parts=groups, skip=taken)
