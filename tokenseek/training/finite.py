"""A loss or gradient that is not finite ends a run, before the optimizer writes it into the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenseek.data.packing import BLANK, unpacked
from tokenseek.errors import UserError

# From examples to a batch.
Collate: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


class NamedExamples:
    """A collator that adds the ``example_id`` of every example to its batch, as a list `example_ids`.

    Of the blank examples, which are the last of a batch, it adds the numbers of tokens as a list `blanks`.
    """

    def __init__(self, collator: Collate) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        features = unpacked(features)
        blanks = [len(feature["input_ids"]) for feature in features if feature.get(BLANK)]
        if blanks:
            features = [{name: value for name, value in feature.items() if name != BLANK} for feature in features]
        batch = self.collator(features)
        if blanks:
            batch["blanks"] = blanks
        if all("example_id" in feature for feature in features):
            batch["example_ids"] = [feature["example_id"] for feature in features]
        return batch


class StopAtNan(TrainerCallback):
    """Looks at the losses and the gradient norm of every optimizer step, in one transfer from the device.

    Under a gradient scaler (fp16) gradients that overflow are no error: the scaler leaves the step out.

    Args:
        accelerator: whose ``clip_grad_norm_`` Trainer calls in every step, be it to clip or to log.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.losses: list[tuple[torch.Tensor, list[str]]] = []
        self.norm: torch.Tensor | float | None = None
        self.scales = accelerator.scaler is not None
        clip = accelerator.clip_grad_norm_

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.norm = clip(*args, **kwargs)
            return self.norm

        accelerator.clip_grad_norm_ = noted

    def note(self, loss: torch.Tensor, examples: list[str]) -> None:
        """The loss of a micro-batch and the examples in it."""
        self.losses.append((loss, examples))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise UserError, with the step and its examples, where a loss or the norm of the gradient is not finite."""
        losses, norm = self.losses, 0.0 if self.norm is None or self.scales else self.norm
        self.losses, self.norm = [], None
        if not losses:
            return
        device = losses[0][0].device
        tensors = [*(loss.detach().float() for loss, _ in losses), torch.as_tensor(norm, dtype=torch.float32)]
        values: list[float]
        *values, norm = torch.stack([_whole(value).to(device, non_blocking=True) for value in tensors]).tolist()
        if all(map(math.isfinite, [*values, norm])):
            return
        named = [
            name for value, (_, names) in zip(values, losses, strict=True) if not math.isfinite(value) for name in names
        ]
        raise UserError(_message(state.global_step + 1, values, norm, named, [n for _, names in losses for n in names]))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _message(step: int, losses: list[float], norm: float, named: list[str], examples: list[str]) -> str:
    if bad := [loss for loss in losses if not math.isfinite(loss)]:
        what, of = f"the loss is {bad[0]}", named
    else:
        what, of = f"the norm of the gradient is {norm}, though the losses of this process are finite", examples
    some = ", ".join(of[:8]) + (f" and {len(of) - 8} more" if len(of) > 8 else "")
    return (
        f"step {step}: {what}; nothing was written into the weights. Examples: {some or 'without example_id'}. Lower "
        "training.learning_rate, train in bfloat16 or float32 instead of float16, or look at these examples; "
        "training.on_nan=continue lets the run continue."
    )
