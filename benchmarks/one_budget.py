"""One budget for a whole batch, of which examples with large scores get more: tried beside one for each example.

It is no option of the package: what an example's draws are would depend on which others share its micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tokenseek import SelectionRule
from tokenseek.ditching import online
from tokenseek.selection.batched import Example, Selection, select_batch


def one_budget(wanted: bool) -> AbstractContextManager[object]:
    """Within it, steps that select their own tokens share the budget of each micro batch among its examples."""
    return patch.object(online, "select_batch", select_of_whole_batch) if wanted else nullcontext()


def select_of_whole_batch(
    rule: SelectionRule,
    examples: Sequence[Example],
    keys_E: torch.Tensor,
    context_BT: torch.Tensor | None,
    gradient_BT: torch.Tensor | None,
    supervised_BT: torch.Tensor,
) -> Selection:
    """As :func:`select_batch`, with all tokens of the batch as one example's, whose key is that of the first."""
    rows, tokens = supervised_BT.shape
    every = np.concatenate([example.row * tokens + example.positions for example in examples])
    in_one_row = [None if given is None else given.reshape(1, -1) for given in (context_BT, gradient_BT)]
    chosen, weights = select_batch(rule, [Example(0, every)], keys_E[:1], *in_one_row, supervised_BT.reshape(1, -1))
    of_row = [chosen[0] // tokens == row for row in range(rows)]
    return Selection(
        pad_sequence([chosen[0][own] % tokens for own in of_row], batch_first=True, padding_value=-1),
        pad_sequence([weights[0][own] for own in of_row], batch_first=True),
    )
