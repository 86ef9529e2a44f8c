"""The seam: every attention layer of Transformers hands its keys and values to a cache and attends to what comes back.

Shapes: B batch, T tokens, S selected, U unselected, N key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenseek.decoder.find import Decoder
from tokenseek.ditching.reach import Reach
from tokenseek.ditching.side_by_side import SideBySide
from tokenseek.errors import UserError
from tokenseek.tiling.cache import KeysAndValuesSeen, OnceCache


class JoiningCache(OnceCache):
    """The cache of one of two passes, in which keys and values of both meet: here or, later, in attention.

    Attributes:
        stop: nothing but the keys and values of the pass is asked for, and :meth:`join` raises
            :class:`KeysAndValuesSeen`.
    """

    def __init__(self, reach: Reach) -> None:
        super().__init__()
        self.reach = reach

    def _update(self, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._record(keys_BNRH, values_BNRH)
        if self.reach.joins_in_attention:
            return keys_BNRH, values_BNRH
        return self.join(keys_BNRH, values_BNRH)

    def join(self, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From keys and values of the rows of this pass, as attention sees them, to those that they attend to."""
        raise NotImplementedError

    def require_given(self, decoder: Decoder, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> None:
        """Raise UserError unless these, in attention, are what the layer handed to its cache."""
        given = [(self.keys, keys_BNRH), (self.values, values_BNRH)]
        if any(mine is not None and mine.shape != rows_BNRH.shape for mine, rows_BNRH in given):
            raise UserError(
                f"{decoder.name} hands its keys and values to its cache in another form (latent) than to attention, "
                "which ranks that share texts do not support. Train without sequence parallelism (sp_size)."
            )


class SelectedCache(JoiningCache):
    """Returns the unselected keys and values, constants, joined by the selected ones, which carry gradient.

    Args:
        unselected: keys and values [B, N, U, H]; none where every token is selected.
        order: in which they are joined; that of the text by default.
    """

    def __init__(self, reach: Reach, *unselected: torch.Tensor, order: SideBySide | None = None) -> None:
        super().__init__(reach)
        self.unselected, self.order = unselected, order

    def join(self, keys_BNSH: torch.Tensor, values_BNSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.order is not None:
            return self._record(*self.order.join(self.unselected, keys_BNSH, values_BNSH))
        whole, (keys_BNUH, values_BNUH) = self.reach.whole, self.unselected or (None, None)
        return self._record(whole.assemble(keys_BNUH, keys_BNSH), whole.assemble(values_BNUH, values_BNSH))


class UnselectedCache(JoiningCache):
    """Runs the selected pass as soon as the unselected keys and values are known; the unselected pass then continues.

    Selected rows attend to unselected keys and the other way round, in the same layer; running one pass in the middle
    of the other is what lets each token be computed once.

    Args:
        run_selected: takes the unselected keys and values [B, N, U, H]; returns the layer's output for the selected
            rows, and the keys and values [B, N, T, H] of all tokens.
        stop: raise :class:`KeysAndValuesSeen` instead of going on.
        order: in which `run_selected` returns them; that of the text by default, in which they are handed on.
    """

    def __init__(
        self,
        reach: Reach,
        run_selected: Callable[[torch.Tensor, torch.Tensor], tuple[Any, tuple[torch.Tensor, ...]]],
        stop: bool,
        order: SideBySide | None = None,
    ) -> None:
        super().__init__(reach)
        self.run_selected = run_selected
        self.stop, self.order = stop, order
        self.selected_output: Any = None

    def join(self, keys_BNUH: torch.Tensor, values_BNUH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.selected_output, (keys_BNTH, values_BNTH) = self.run_selected(keys_BNUH, values_BNUH)
        if self.stop:
            raise KeysAndValuesSeen
        whole = keys_BNTH.detach(), values_BNTH.detach()
        return whole if self.order is None else self.order.in_text_order(*whole)
