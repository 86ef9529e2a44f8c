"""The selection of a batch whose scores were just made, by the same rules and draws as that of one example.

Shapes: B rows of the batch, E examples in them (B, or more where rows are packed), T tokens, S selected tokens of the
row that has most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

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
    scores = {"context": context_BT, "gradient": gradient_BT}
    on_host = {name: None if given is None else given.double().cpu().numpy() for name, given in scores.items()}
    supervised = supervised_BT.cpu().numpy()
    rows: list[list[_Chosen]] = [[] for _ in range(len(supervised))]
    for number, (example, key) in enumerate(zip(examples, keys, strict=True)):
        row, positions = example
        if len(positions):
            own = {name: None if given is None else given[row, positions] for name, given in on_host.items()}
            _require_finite(own, f"example {number} of the batch (key {key})")
            chosen, weights = _select(rule, own, key, supervised[row, positions])
            rows[row].append((positions[chosen], weights))
    return _in_rows(rows, supervised_BT.device)


# Positions, ascending, and the weights of their losses.
_Chosen: TypeAlias = tuple[np.ndarray, np.ndarray]


def _require_finite(scores: Mapping[str, np.ndarray | None], example: str) -> None:
    for name, given in scores.items():
        if given is not None and not np.isfinite(given).all():
            raise UserError(
                f"{name} scores of {example} are not finite. The model's loss or activations overflow there: lower the "
                "learning rate, or compute in bfloat16 or float32."
            )


def _select(rule: SelectionRule, scores: Mapping[str, np.ndarray | None], key: int, has_loss: np.ndarray) -> _Chosen:
    """The tokens of one example, by their numbers in it.

    Args:
        scores: context and gradient; None where the rule needs none.
        has_loss: bool, of each token.
    """
    count = len(has_loss)
    if rule.needs_scores:
        scores = {name: np.zeros(count) if given is None else given for name, given in scores.items()}
    chosen, weights = select_weighted(
        rule, *scores.values(), row=key & 0xFFFFFFFF, visit=key >> 32, supervised=has_loss, num_tokens=count
    )
    if not rule.has_weights:
        weights = np.full(len(chosen), has_loss.sum() / max(1, has_loss[chosen].sum()))
    return chosen, weights


def _in_rows(rows: Sequence[Sequence[_Chosen]], device: torch.device) -> Selection:
    """What is chosen of the examples of each row, one example after the other, padded at the end."""
    longest = max(1, *(sum(len(chosen) for chosen, _ in parts) for parts in rows))
    positions_BS = np.full((len(rows), longest), -1, np.int64)
    weights_BS = np.zeros((len(rows), longest), np.float32)
    for row, parts in enumerate(rows):
        end = 0
        for chosen, weights in parts:
            first, end = end, end + len(chosen)
            positions_BS[row, first:end], weights_BS[row, first:end] = chosen, weights
    return Selection(torch.from_numpy(positions_BS).to(device), torch.from_numpy(weights_BS).to(device))
