"""Keys and values that selected rows look at, which in layers with a window are not all.

Where windows are short, or selected tokens stand together (a response behind a long prompt), that is a part of all;
nothing else waits for the backward pass.

Shapes: B batch, T tokens, R rows of keys and values, X those that are seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tokenseek.decoder.masks import SlidingWindow
from tokenseek.ditching.reach import PlainReach, Reach
from tokenseek.ditching.rows import Partition

# A copy of the rows that are seen is worth it where they are no more than this share.
MOST_SEEN = 0.9


def seen_rows(reach: Reach, mask: torch.Tensor | SlidingWindow | None, count: int) -> torch.Tensor | None:
    """[X] int64: which of `count` rows of keys and values selected rows look at, in any example; once a step.

    The rows are the unselected ones, or all tokens. None where nearly all are seen, and where rows have no order.

    Args:
        mask: of the layer: a window, or what tokens look at, [B | 1, N | 1, T, T]. The host waits for the device to
            learn what the latter says.
    """
    rows = reach.whole.selected
    found: torch.Tensor | None = None
    if isinstance(mask, SlidingWindow):
        window = mask
        found = rows.once(f"seen.{window}.{count}", rows.index_BR, lambda: _seen(reach, window, count))
    elif type(reach) is PlainReach and isinstance(mask, torch.Tensor) and mask.dim() == 4:
        of_all = mask
        found = rows.once(f"seen.{count}", of_all, lambda: _seen_by_mask(reach.parts, of_all, count))
    return found


def _seen_by_mask(parts: Partition, mask: torch.Tensor, count: int) -> torch.Tensor | None:
    of_selected: torch.Tensor = parts.selected.shrink("attention_mask", mask)
    looks = of_selected if mask.dtype == torch.bool else of_selected > torch.finfo(mask.dtype).min / 2
    seen_BT = looks.any(dim=2).any(dim=1)
    if parts.unselected is not None and count != parts.tokens:
        index_BU = parts.unselected.index_BR
        seen_BT = seen_BT.expand(len(index_BU), -1).gather(1, index_BU)
    seen_X = seen_BT.any(dim=0).nonzero().squeeze(1)
    return None if len(seen_X) > MOST_SEEN * count else seen_X


def _seen(reach: Reach, window: SlidingWindow, count: int) -> torch.Tensor | None:
    whole = reach.whole
    selected = whole.selected.on_host
    unselected = None if whole.unselected is None else whole.unselected.on_host
    of_all = whole.unselected is None or count == whole.tokens
    if selected is None or not (of_all or unselected):
        return None
    is_seen_R = np.zeros(count, dtype=bool)
    for number, positions_S in enumerate(selected):
        seen_T = _seen_by(positions_S, window.size, whole.tokens)
        if not of_all and unselected:
            seen_T = seen_T[unselected[number]]
        is_seen_R[: len(seen_T)] |= seen_T
    seen_X = np.flatnonzero(is_seen_R)
    if len(seen_X) > MOST_SEEN * count:
        return None
    return torch.from_numpy(seen_X).to(whole.selected.index_BR.device)


def _seen_by(positions_S: Sequence[int], size: int, tokens: int) -> np.ndarray:
    """[T] bool: in the window of some row."""
    last_S = np.asarray(positions_S, dtype=np.int64)
    borders = np.zeros(tokens + 1, dtype=np.int64)
    np.add.at(borders, np.maximum(last_S - size + 1, 0), 1)
    np.add.at(borders, last_S + 1, -1)
    return borders[:-1].cumsum() > 0
