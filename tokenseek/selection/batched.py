"""The selection of a batch whose scores were just made, by the same rules and draws as that of one example.

Shapes: B rows of the batch, E examples in them (B, or more where rows are packed), T tokens, S selected tokens of the
row that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tokenseek.errors import UserError
from tokenseek.selection.select import select_weighted
from tokenseek.selection.settings import SelectionRule


class Example(NamedTuple):
    """One example of a batch: the row that holds it, and the positions of its tokens there, ascending."""

    row: int
    positions: np.ndarray


class Selection(NamedTuple):
    """What is selected in a batch.

    Attributes:
        positions: int64 [B, S], ascending, -1 where a row has no further one.
        weights: float32 [B, S], of the positions' losses; 0 where there is none.
    """

    positions: torch.Tensor
    weights: torch.Tensor


def draw_key(example: int, visit: int) -> int:
    """The key of an example's draws: 32 bits that tell the example, and how often it was seen before."""
    return (visit << 32) | (example & 0xFFFFFFFF)


def examples_of(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, shape: Sequence[int]
) -> list[Example]:
    """The examples of a batch [B, T]: one a row, less its padding, or several in a row without padding.

    Args:
        attention_mask: [B, T], 0 at padding; None where there is none.
        position_ids: [B | 1, T] that restart with every packed example; not looked at where there is a mask.
    """
    batch, tokens = shape
    if attention_mask is not None:
        return [Example(row, np.flatnonzero(valid)) for row, valid in enumerate(attention_mask.bool().cpu().numpy())]
    if position_ids is None:
        return [Example(row, np.arange(tokens)) for row in range(batch)]
    found = []
    for row, ids in enumerate(position_ids.expand(batch, -1).cpu().numpy()):
        borders = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1, append=ids[-1]) != 1)
        found += [Example(row, np.arange(first, end)) for first, end in zip([0, *borders], [*borders], strict=False)]
    return [example for example in found if len(example.positions)]


def select_batch(
    rule: SelectionRule,
    examples: Sequence[Example],
    keys_E: torch.Tensor,
    context_BT: torch.Tensor | None,
    gradient_BT: torch.Tensor | None,
    supervised_BT: torch.Tensor,
) -> Selection:
    """Select the tokens of every example, as :func:`tokenseek.selection.select_weighted` does for one.

    The losses of a rule with weights stand for those of all candidates. So do they of the other rules here: every
    selected supervised token weighs as much as the example has supervised tokens for each selected one. The loss of a
    step is then known to be divided by the number of all its supervised tokens before anything is selected.

    Args:
        rule: how to select.
        examples: of the batch, see :func:`examples_of`.
        keys_E: int64, of the examples' draws, see :func:`draw_key`.
        context_BT, gradient_BT: scores; None where the rule needs none.
        supervised_BT: True where a position's prediction has a loss.

    Raises:
        UserError: another number of keys than of examples; scores that are not finite, by example.
    """
    keys = keys_E.tolist()
    if len(keys) != len(examples):
        raise UserError(
            f"selection_keys are {len(keys)} for {len(examples)} examples in the batch; give one int64 for each."
        )
    device = supervised_BT.device
    context, gradient = (None if s is None else s.double().cpu().numpy() for s in (context_BT, gradient_BT))
    supervised = supervised_BT.cpu().numpy()
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(len(supervised))]
    for number, (example, key) in enumerate(zip(examples, keys, strict=True)):
        row, positions = example
        if not len(positions):
            continue
        own = [None if scores is None else scores[row, positions] for scores in (context, gradient)]
        for name, scores in zip(("context", "gradient"), own, strict=True):
            if scores is not None and not np.isfinite(scores).all():
                raise UserError(
                    f"{name} scores of example {number} of the batch (key {key}) are not finite. The model's loss or "
                    "activations overflow there: lower the learning rate, or compute in bfloat16 or float32."
                )
        if rule.needs_scores:
            own = [np.zeros(len(positions)) if scores is None else scores for scores in own]
        has_loss = supervised[row, positions]
        chosen, weights = select_weighted(
            rule, *own, row=key & 0xFFFFFFFF, visit=key >> 32, supervised=has_loss, num_tokens=len(positions)
        )
        if not rule.has_weights:
            weights = np.full(len(chosen), has_loss.sum() / max(1, has_loss[chosen].sum()))
        rows[row].append((positions[chosen], weights))
    longest = max(1, *(sum(len(chosen) for chosen, _ in parts) for parts in rows))
    positions_BS = np.full((len(rows), longest), -1, np.int64)
    weights_BS = np.zeros((len(rows), longest), np.float32)
    for row, parts in enumerate(rows):
        end = 0
        for chosen, weights in parts:
            first, end = end, end + len(chosen)
            positions_BS[row, first:end], weights_BS[row, first:end] = chosen, weights
    return Selection(torch.from_numpy(positions_BS).to(device), torch.from_numpy(weights_BS).to(device))
