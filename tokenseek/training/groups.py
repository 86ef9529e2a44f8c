"""Transformers' Trainer, told that examples belong to groups of processes and not to processes.

A group is one process, or the sequence-parallel ranks that share their examples. Trainer and accelerate know the
processes only: left alone they would give each rank of a group other examples, and count every token once per rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from accelerate.utils import recursively_apply
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import EvalLoopOutput, has_length

from tokenseek.data.packing import unpacked
from tokenseek.data.streaming import StreamedExamples
from tokenseek.decoder.find import leaves_parameters_out
from tokenseek.ditching import ditching_of
from tokenseek.errors import UserError
from tokenseek.launching.sequence import launched_sp_size, unseen_by_accelerate
from tokenseek.parallel import shared_by
from tokenseek.training.checkpoints import writing
from tokenseek.training.evaluating import loss_in_pieces
from tokenseek.training.finite import Collate, NamedExamples, StopAtNan
from tokenseek.training.held_out import held_out_loss
from tokenseek.training.sampling import EpochSampler, LengthGroupedSampler, WithBlanks

_log = logging.getLogger(__name__)


class GroupTrainer(Trainer):
    """``transformers.Trainer`` whose losses do not depend on how many processes there are and how they are grouped.

    It never repeats an example to fill the last batch of an epoch. Where the model is sequence-parallel
    (:func:`tokenseek.parallel.enable_sequence_parallelism`), the ranks of a group are given the same examples, and
    examples, tokens and floating-point operations are counted once for all of them.

    Args:
        model: a causal LM, plain or PEFT-wrapped.
        on_nan: "stop" raises :class:`UserError` at a loss or gradient that is not finite, with the step and examples
            (of data with an ``example_id``), before the optimizer takes it; "continue" does nothing about it.
        token_mean: evaluations give the mean over tokens, :func:`~tokenseek.training.held_out.held_out_loss`, and not
            Trainer's mean over batches, in which a token of a short answer counts more than one of a long answer.

    Raises:
        UserError: the model and the launch (``sp_size`` of its accelerate config) disagree on who shares examples.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        on_nan: str = "stop",
        token_mean: bool = False,
        **kwargs: Any,
    ) -> None:
        if on_nan not in ("stop", "continue"):
            raise UserError(f"on_nan is {on_nan!r}; it must be 'stop' or 'continue'.")
        args.logging_nan_inf_filter = False  # would log such a loss as the mean of those before
        if args.ddp_find_unused_parameters is None:  # DDP then goes through the graph of every step
            args.ddp_find_unused_parameters = leaves_parameters_out(model)
        if ditching_of(model) is not None and (args.label_smoothing_factor or kwargs.get("compute_loss_func")):
            raise UserError(
                "label_smoothing_factor and compute_loss_func are incompatible with token ditching and sequence "
                "parallelism: the model computes the loss itself, over the tokens that it trains on. Leave them out."
            )
        group = shared_by(model)
        self.group_size = 1 if group is None else group.size()
        if group is not None:
            _require_neighbours(group)
        if args.parallelism_config is not None and args.parallelism_config.sp_size > 1:
            raise UserError(
                "TrainingArguments.parallelism_config asks for accelerate's own sequence parallelism, which cuts "
                "batches up; leave it out, and call tokenseek.parallel.enable_sequence_parallelism(model, group)."
            )
        if (launched := launched_sp_size()) not in (1, self.group_size):
            raise UserError(
                f"The accelerate config of this launch has sp_size {launched}, but {self.group_size} rank(s) share the "
                "model's examples. Call tokenseek.parallel.enable_sequence_parallelism(model, "
                "tokenseek.parallel.sequence_group(device_type)) before making the Trainer."
            )
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False  # torch would warn that there is nothing to pin it for
        _copy_beside_the_work(args)
        super().__init__(model, args, **kwargs)
        self.token_mean = token_mean
        self._blanks: list[int] = []  # the blank examples of the batch at hand, by their tokens
        self._uncounted: list[dict[str, Any]] = []  # micro-batches whose tokens are not counted yet
        self.new_epoch = NewEpoch()
        self.add_callback(self.new_epoch)
        self.stop_at_nan = StopAtNan(self.accelerator) if on_nan == "stop" else None
        if self.stop_at_nan:
            self.add_callback(self.stop_at_nan)
        self.add_callback(CountTokens(self))  # behind it: the host has waited by then

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Transformers' schedule; a warm-up that takes the whole run is told."""
        if self.lr_scheduler is None:
            if self.is_world_process_zero():
                _tell_of_warm_up(self.args.warmup_steps, num_training_steps)
            if _is_below_a_step(self.args.warmup_steps, num_training_steps):
                self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def num_groups(self) -> int:
        """How many batches are in work at once."""
        return int(self.accelerator.num_processes) // self.group_size

    def create_accelerator_and_postprocess(self) -> None:
        with unseen_by_accelerate():
            super().create_accelerator_and_postprocess()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        examples, self._blanks = inputs.pop("example_ids", []), inputs.pop("blanks", [])
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.stop_at_nan:
            self.stop_at_nan.note(loss, examples)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        in_pieces: AbstractContextManager[None] = nullcontext()
        own_loss = self.label_smoother is None and self.compute_loss_func is None
        if prediction_loss_only and own_loss and inputs.get("labels") is not None:  # nobody asks for logits
            in_pieces = loss_in_pieces(model, inputs["labels"].shape, self.accelerator.autocast)
        with in_pieces:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with writing(Path(output_dir or str(self.args.output_dir))):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        with writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        plain_collator = self.data_collator
        self.data_collator = self._collator_of_training()
        try:
            return self._train_dataloader()
        finally:
            self.data_collator = plain_collator

    def _collator_of_training(self) -> Collate:
        # A stream's batches may be dealt from the main process by accelerate, which cuts up tensors alone.
        collator = cast(Collate, self.data_collator)
        return NamedExamples(collator) if has_length(self.train_dataset) else collator

    def _train_dataloader(self) -> DataLoader[Any]:
        plain: Any = self.train_dataset
        strategy = self.args.train_sampling_strategy
        if not has_length(plain) or strategy not in ("random", "sequential", "group_by_length"):
            return super().get_train_dataloader()
        examples: Any = plain
        per_round = self._train_batch_size * self.num_groups
        blanks = 0 if self.args.dataloader_drop_last else -len(plain) % per_round
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if strategy == "group_by_length":
            group = per_round * self.args.gradient_accumulation_steps
            sampler: LengthGroupedSampler | EpochSampler = LengthGroupedSampler(_lengths(examples), blanks, seed, group)
        else:
            sampler = EpochSampler(len(plain), blanks, seed if strategy == "random" else None)
        self.new_epoch.sampler = sampler
        return self._get_dataloader(
            dataset=WithBlanks(examples, blanks),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: sampler,
            is_training=True,
        )

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        made = super()._get_dataloader(*args, **kwargs)
        loader: Any = made
        shard = loader.dataset
        stream = shard.dataset if isinstance(shard, IterableDatasetShard) else shard
        if isinstance(stream, StreamedExamples):
            if shard is not stream:
                shard.num_processes, shard.process_index = 1, 0  # the stream gives each group its own examples
            # An iterator begins by a draw, which a resumed run makes again: not from the state that dropout draws from.
            loader.base_dataloader.generator = torch.Generator()
            return made
        if self.group_size > 1:
            dealt = [
                part
                for part in (loader.batch_sampler, loader.dataset)
                if isinstance(part, (BatchSamplerShard, IterableDatasetShard))
            ]
            if not dealt:
                raise UserError(
                    "accelerate deals the batches of this data set from the main process, which cannot count groups of "
                    "sequence-parallel ranks. Give a data set with a length, or set accelerator_config's "
                    "dispatch_batches to False."
                )
            for part in dealt:
                part.num_processes = self.num_groups
                part.process_index = self.accelerator.process_index // self.group_size
                if self.num_groups == 1:  # no other group needs a batch when the last one is short
                    part.even_batches = False
        return made

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self.group_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.group_size

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Trainer's own way waits for the device, to count the tokens of every micro-batch.
        self._uncounted.append(_without_blanks(inputs, self._blanks))

    def count_tokens(self) -> None:
        """Count the tokens of the micro-batches of a step, as Trainer does."""
        before = self.state.num_input_tokens_seen
        for inputs in self._uncounted:
            super()._track_num_input_tokens(inputs)
        self._uncounted.clear()
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.group_size

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.token_mean and prediction_loss_only:
            dataset = cast(datasets.Dataset, dataloader.dataset)
            metrics = {f"{metric_key_prefix}_loss": held_out_loss(self, dataset)}
            return EvalLoopOutput(cast(Any, None), None, metrics, len(dataset))
        if self.group_size > 1:
            self.gather_function = self._gather_of_groups
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def _gather_of_groups(self, data: Any) -> Any:
        """As accelerate's ``gather_for_metrics``, from one rank of each group."""

        def first_ranks(everyone: torch.Tensor) -> torch.Tensor:
            by_group: torch.Tensor = everyone.unflatten(0, (self.num_groups, self.group_size, -1))
            return by_group[:, 0].flatten(0, 1)

        data = recursively_apply(first_ranks, self.accelerator.gather(data))
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # the last round was filled up with repeated examples
            data = recursively_apply(lambda values: values[: state.remainder], data)
        return data


def _copy_beside_the_work(args: TrainingArguments) -> None:
    """Have the host go on while a batch is copied to a GPU, instead of waiting for all that is at work there."""
    if torch.cuda.is_available() and args.dataloader_pin_memory:
        cast(AcceleratorConfig, args.accelerator_config).non_blocking = True


class CountTokens(TrainerCallback):
    """Counts the tokens of a step before the optimizer's, where the host looks at its losses and waits anyway."""

    def __init__(self, trainer: GroupTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.count_tokens()


class DrawsByEpoch(Protocol):
    """A sampler or a collator whose draws depend on the epoch."""

    def set_epoch(self, epoch: int) -> None: ...


def _is_below_a_step(warmup: float, steps: int) -> bool:
    """Whether a warm-up of this share of the steps, if it is one, is shorter than one of them.

    Transformers rounds a share up, and the first step of a warm-up has a learning rate of 0: the only step of a short
    run would train nothing.
    """
    return 0 < warmup < 1 and warmup * steps < 1


def _tell_of_warm_up(warmup: float, steps: int) -> None:
    """Log what the warm-up of a short run comes to; it is a number of steps or, below 1, a share of them."""
    fewer = "Give fewer, or a share of the steps below 1."
    if _is_below_a_step(warmup, steps):
        _log.info(f"warm-up: {warmup:.0%} of {steps:,} step{'s' * (steps > 1)} is less than a step, so there is none")
    elif warmup >= steps == 1:
        _log.warning(
            f"warmup_steps is {warmup:g} and the run has one step, whose learning rate is 0: nothing is trained. "
            f"{fewer}"
        )
    elif warmup >= steps:
        _log.warning(
            f"warmup_steps is {warmup:g} and the run has {steps:,} steps: the learning rate rises to the end and is "
            f"never what learning_rate says. {fewer}"
        )


class NewEpoch(TrainerCallback):
    """Tells the epoch to what draws by it; accelerate does not reach the sampler of a run that resumes mid-epoch.

    Attributes:
        collator: a :class:`TokenSeekCollator`, if its selections are to be told too.
    """

    def __init__(self) -> None:
        self.sampler: DrawsByEpoch | None = None
        self.collator: DrawsByEpoch | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = int(state.epoch or 0)
        for draws in (self.collator, self.sampler):
            if draws is not None:
                draws.set_epoch(epoch)


def _without_blanks(inputs: dict[str, Any], blanks: list[int]) -> dict[str, Any]:
    """What counts the tokens of a batch, without those of the blank examples at its end."""
    counted: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    if not blanks or not counted:
        return dict(counted) or inputs
    if "attention_mask" in inputs:  # one example a row
        return {name: tensor[: len(tensor) - len(blanks)] for name, tensor in counted.items()}
    return {name: tensor[:, : tensor.shape[1] - sum(blanks)] for name, tensor in counted.items()}


def _lengths(dataset: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of every example, or of every row of packed ones."""
    if isinstance(dataset, datasets.Dataset):
        return [len(ids) for ids in dataset["input_ids"]]
    items = (unpacked([dataset[position]]) for position in range(len(dataset)))
    return [sum(len(example["input_ids"]) for example in examples) for examples in items]


def _require_neighbours(group: dist.ProcessGroup) -> None:
    ranks, size = dist.get_process_group_ranks(group), group.size()
    if ranks != list(range(ranks[0], ranks[0] + size)) or ranks[0] % size:
        raise UserError(
            f"the ranks {ranks} share examples; a Trainer needs neighbours, such as "
            f"{list(range(size))}. Make the groups with init_device_mesh(device_type, (dp, sp)), sp being the last "
            "dimension."
        )
