"""Training on selected tokens with the Trainer that everybody knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import ditching_of, enable_token_ditching
from tokenseek.ditching.planned import KnownBatch, PlannedRows
from tokenseek.ditching.state import require_ditching
from tokenseek.ditching.zero3 import fetch_a_layer_ahead, gather_layers_once
from tokenseek.errors import UserError
from tokenseek.training.collator import TokenSeekCollator
from tokenseek.training.finite import Collate
from tokenseek.training.groups import GroupTrainer
from tokenseek.training.online import OnlineTotals


class TokenSeekTrainer(GroupTrainer):
    """``transformers.Trainer`` with token ditching; everything else (resume, logging, callbacks, ...) is Trainer's own.

    Enables token ditching on the model unless it is enabled already, keeps the data set's ``example_id``, redraws
    random selections every epoch, evaluates and predicts on all tokens, and never repeats an example to fill the last
    batch of an epoch, so that losses do not depend on the number of processes. Of a sequence-parallel model, all ranks
    of a group are given the same examples. Where the model selects (``TokenSeekCollator()``), logs
    hold ``loss_all`` beside ``loss``: the mean loss of all supervised tokens, as ordinary training logs it.

    Args:
        model: a causal LM, plain or PEFT-wrapped.
        args: as for Trainer; ``activation_checkpointing=True`` recomputes the selected tokens only.
        data_collator: a :class:`TokenSeekCollator`.

    Example:
        >>> trainer = TokenSeekTrainer(
        ...     model, TrainingArguments("out"), data_collator=TokenSeekCollator(pad_token_id=tokenizer.pad_token_id),
        ...     train_dataset=prepared.dataset,
        ... )
        >>> trainer.train()
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, data_collator: TokenSeekCollator, **kwargs: Any
    ) -> None:
        if not isinstance(data_collator, TokenSeekCollator):
            raise UserError(
                f"TokenSeekTrainer needs a TokenSeekCollator as data_collator, got {type(data_collator).__name__}; to "
                "train on all tokens use transformers.Trainer or tokenseek.training.GroupTrainer."
            )
        if ditching_of(model) is None:
            enable_token_ditching(model)
        decoder = find_decoder(model)
        gather_layers_once(decoder)  # `args` may have brought ZeRO-3 only now
        if args.deepspeed_plugin is not None:
            fetch_a_layer_ahead(decoder, args.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {}))
        args.remove_unused_columns = False  # example_id is for the collator
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        self.new_epoch.collator = data_collator
        self.online = OnlineTotals()

    def _collator_of_training(self) -> Collate:
        collator, ditching = super()._collator_of_training(), require_ditching(cast(nn.Module, self.model))
        if not has_length(self.train_dataset) or ditching.sequence or self.args.n_gpu > 1:
            return collator
        return PlanningCollator(collator, ditching.attention_is_ours)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if inputs.get("selection") is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.online.add(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and (loss_all := self.online.loss_all(self.accelerator)) is not None:
            logs["loss_all"] = loss_all
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader[Any]:
        with self._all_tokens():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader[Any]:
        with self._all_tokens():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _all_tokens(self) -> Iterator[None]:
        with_selection = cast(TokenSeekCollator, self.data_collator)
        self.data_collator = with_selection.without_selection()
        try:
            yield
        finally:
            self.data_collator = with_selection


class PlanningCollator:
    """Adds to its batch what the host knows of it, where it collates.

    That is `planned_rows`, a :class:`~tokenseek.ditching.planned.PlannedRows`, or `known_batch`, a
    :class:`~tokenseek.ditching.planned.KnownBatch` where the model selects.
    """

    def __init__(self, collator: Collate, attention_is_ours: bool) -> None:
        self.collator, self.attention_is_ours = collator, attention_is_ours

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(features)
        if "selected_positions" in batch:
            planned = PlannedRows.of(batch, self.attention_is_ours)
            batch |= {"planned_rows": planned} if planned else {}
        elif "selection" in batch:
            given = batch.get("attention_mask"), batch.get("position_ids")
            keys = batch["selection_keys"]
            batch["known_batch"] = KnownBatch.of(batch["labels"], keys, *given, self.attention_is_ours)
        return batch
