"""Caches that a layer hands its keys and values to, and that live for one pass through it.

Shapes: B batch, T tokens, R rows of a pass, N, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache

from tokenseek.decoder.find import Decoder
from tokenseek.errors import UserError
from tokenseek.versions import what_to_install


class KeysAndValuesSeen(Exception):
    """Ends a layer's pass at its keys and values: nobody needs what comes beyond them."""


class OnceCache(Cache):
    """A cache that lives for one pass through one layer and is updated once in it."""

    stop = False  # see `tokenseek.ditching.cache.JoiningCache`

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


class ProjectedCache(OnceCache):
    """Ends a tile's first sweep at its keys and values [B, K, R, H]."""

    def _update(self, keys_BKRH: torch.Tensor, values_BKRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._record(keys_BKRH, values_BKRH)
        raise KeysAndValuesSeen


class WholeCache(OnceCache):
    """Returns keys and values of all tokens, [B, K, T, H], for a tile's second sweep."""

    def __init__(self, keys_BKTH: torch.Tensor, values_BKTH: torch.Tensor) -> None:
        super().__init__()
        self._whole = keys_BKTH, values_BKTH

    def _update(self, keys_BKRH: torch.Tensor, values_BKRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._record(*self._whole)
