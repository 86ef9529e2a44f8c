"""The seam: every attention layer of Transformers hands its keys and values to a cache and attends to what comes back.

Shapes: B batch, T tokens, S selected, U unselected, N key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache

from tokenseek.decoder.find import Decoder
from tokenseek.ditching.reach import Reach
from tokenseek.errors import UserError
from tokenseek.versions import what_to_install


class KeysAndValuesSeen(Exception):
    """Ends the last layer's unselected pass: beyond its keys and values, nobody needs that layer's unselected rows."""


class OnceCache(Cache):
    """A cache that lives for one pass through one layer and is updated once in it."""

    def __init__(self) -> None:  # the base class would build storage for every layer
        self.layers = []
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer attends to, given keys and values [B, N, R, H] of the rows of its pass.

        Raises:
            UserError: the layer has been here before.
        """
        if self.keys is not None:
            raise UserError(
                f"layer {layer_idx} updates its key/value cache more than once; this model is not supported."
            )
        return self._update(key_states, value_states)

    def _update(self, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _record(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values

    def given_by(self, layer: nn.Module, decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that a layer of `decoder` has put in.

        Raises:
            UserError: it has put nothing in.
        """
        if self.keys is None or self.values is None:
            raise UserError(
                f"{type(layer).__name__} in {decoder.name} does not pass its keys and values through its cache; "
                f"this model is not supported. {what_to_install('transformers')}"
            )
        return self.keys, self.values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0


class SelectedCache(OnceCache):
    """Returns the unselected keys and values, constants, joined by the selected ones, which carry gradient.

    Args:
        unselected_keys, unselected_values: [B, N, U, H]; None where every token is selected.
    """

    def __init__(
        self,
        reach: Reach,
        unselected_keys: torch.Tensor | None = None,
        unselected_values: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.reach = reach
        self.unselected_keys, self.unselected_values = unselected_keys, unselected_values

    def _update(self, keys_BNSH: torch.Tensor, values_BNSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys_BNSH, values_BNSH = self.reach.exchange(keys_BNSH, values_BNSH)
        whole = self.reach.whole
        keys_BNTH = whole.assemble(self.unselected_keys, keys_BNSH)
        values_BNTH = whole.assemble(self.unselected_values, values_BNSH)
        return self._record(keys_BNTH, values_BNTH)


class UnselectedCache(OnceCache):
    """Runs the selected pass as soon as the unselected keys and values are known; the unselected pass then continues.

    Selected rows attend to unselected keys and the other way round, in the same layer; running one pass inside the
    other's update is what lets each token be computed once.

    Args:
        run_selected: takes the unselected keys and values [B, N, U, H]; returns the layer's output for the selected
            rows, and the keys and values [B, N, T, H] of all tokens.
        stop: raise :class:`KeysAndValuesSeen` instead of going on.
    """

    def __init__(
        self,
        run_selected: Callable[[torch.Tensor, torch.Tensor], tuple[Any, tuple[torch.Tensor, ...]]],
        stop: bool,
    ) -> None:
        super().__init__()
        self.run_selected = run_selected
        self.stop = stop
        self.selected_output: Any = None

    def _update(self, keys_BNUH: torch.Tensor, values_BNUH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._record(keys_BNUH, values_BNUH)
        self.selected_output, (keys_BNTH, values_BNTH) = self.run_selected(keys_BNUH, values_BNUH)
        if self.stop:
            raise KeysAndValuesSeen
        return keys_BNTH.detach(), values_BNTH.detach()
