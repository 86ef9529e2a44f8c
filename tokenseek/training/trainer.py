"""Training on selected tokens with the Trainer that everybody knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from tokenseek.ditching import enable_token_ditching
from tokenseek.errors import UserError
from tokenseek.modeling import find_decoder
from tokenseek.training.collator import TokenSeekCollator


class TokenSeekTrainer(Trainer):
    """``transformers.Trainer`` with token ditching; everything else (resume, logging, callbacks, ...) is Trainer's own.

    Enables token ditching on the model unless it is enabled already, keeps the data set's ``example_id``, redraws random
    selections every epoch, and evaluates and predicts on all tokens.

    Args:
        model: a causal LM, plain or PEFT-wrapped.
        args: as for Trainer; ``gradient_checkpointing=True`` recomputes the selected tokens only.
        data_collator: a :class:`TokenSeekCollator`.

    Example:
        >>> trainer = TokenSeekTrainer(
        ...     model, TrainingArguments("out"), data_collator=TokenSeekCollator("index.arrow", ratio=0.1),
        ...     train_dataset=prepared.dataset,
        ... )
        >>> trainer.train()
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, data_collator: TokenSeekCollator, **kwargs):
        if not isinstance(data_collator, TokenSeekCollator):
            raise UserError(
                f"TokenSeekTrainer needs a TokenSeekCollator as data_collator, got {type(data_collator).__name__}; to "
                "train on all tokens use transformers.Trainer."
            )
        if args.label_smoothing_factor or kwargs.get("compute_loss_func"):
            raise UserError(
                "label_smoothing_factor and compute_loss_func cannot be had with TokenSeekTrainer: the model computes the "
                "loss itself, over the selected tokens. Leave them out."
            )
        if not hasattr(find_decoder(model).causal_lm, "_token_ditching"):
            enable_token_ditching(model)
        args.remove_unused_columns = False  # example_id is for the collator
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        self.add_callback(_NewEpoch(data_collator))

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        with self._all_tokens():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        with self._all_tokens():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _all_tokens(self) -> Iterator[None]:
        with_selection, self.data_collator = self.data_collator, self.data_collator.without_selection()
        try:
            yield
        finally:
            self.data_collator = with_selection


class _NewEpoch(TrainerCallback):
    def __init__(self, collator: TokenSeekCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))
