"""Keys and values of both passes side by side, the unselected ones first: no row of them is moved to its place.

The mask of few selected rows can say of any key where it is in the text, and the gradient of their own keys and values
is then a stretch of the whole. Only the unselected rows, whose kernels know causality by the order of the text, have
keys and values put into it, both at once.

Shapes: B = 1, U unselected, S selected, X = U + S, N heads, H head dim.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tokenseek.decoder.device import share_memory
from tokenseek.ditching.rows import Partition


class SideBySide:
    """The order in which keys and values of one step lie: those of unselected rows, then those of selected ones.

    They are the first X tokens of the text: what comes behind the last selected one is in neither pass.
    """

    def __init__(self, parts: Partition) -> None:
        self.parts = parts
        rows = [rows.index_BR for rows in (parts.unselected, parts.selected) if rows is not None]
        self.position_X = torch.cat(rows, dim=1)[0] if len(rows) > 1 else rows[0][0]

    @classmethod
    def of(cls, parts: Partition) -> SideBySide | None:
        """Of a step's rows, once a step; None where these are many, or not of one text without padding."""
        rows = parts.selected
        if len(rows.index_BR) > 1 or parts.padded or len(rows.spans) > 1:
            return None
        return rows.once("side by side", rows.index_BR, lambda: cls(parts))

    @property
    def keys(self) -> int:
        return len(self.position_X)

    @cached_property
    def causal_mask(self) -> torch.Tensor:
        """[1, 1, S, X] bool: the keys that selected rows see."""
        return (self.position_X <= self.parts.selected.index_BR[:, :, None])[:, None]

    @cached_property
    def _place_2X(self) -> torch.Tensor:
        """Of every token of the text in the keys, then in the values behind them."""
        place_X = torch.empty_like(self.position_X)
        place_X[self.position_X] = torch.arange(self.keys, device=place_X.device)
        return torch.cat([place_X, place_X + self.keys])

    def join(
        self, unselected: tuple[torch.Tensor, ...], key_1NSH: torch.Tensor, value_1NSH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, N, X, H]; gradient reaches those of selected rows.

        Args:
            unselected: [1, N, U, H] each; none where every token is selected.
        """
        if not unselected:
            return key_1NSH, value_1NSH
        keys, values = _Joined.apply(key_1NSH, value_1NSH, *unselected)
        return keys, values

    def in_text_order(self, keys_1NXH: torch.Tensor, values_1NXH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both in the order of the text, as a copy."""
        if self.parts.unselected is None:
            return keys_1NXH, values_1NXH
        place_X, both_12XNH = self._place_2X[: self.keys], _both(keys_1NXH, values_1NXH)
        if both_12XNH is None:
            return keys_1NXH.index_select(2, place_X), values_1NXH.index_select(2, place_X)
        keys, values = both_12XNH.index_select(1, self._place_2X).transpose(1, 2).split(self.keys, dim=2)
        return keys, values


class _Joined(torch.autograd.Function):
    """Of keys and values of both passes, in one copy where they have the same shape."""

    @staticmethod
    def forward(
        ctx: Any,
        key_1NSH: torch.Tensor,
        value_1NSH: torch.Tensor,
        unselected_key_1NUH: torch.Tensor,
        unselected_value_1NUH: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.unselected = unselected_key_1NUH.shape[2]
        keys, values = (unselected_key_1NUH, key_1NSH), (unselected_value_1NUH, value_1NSH)
        if key_1NSH.shape != value_1NSH.shape:
            return _token_major(*keys), _token_major(*values)
        joined = _token_major(*keys, *values)
        keys_1NXH, values_1NXH = joined.split(joined.shape[2] // 2, dim=2)
        return keys_1NXH, values_1NXH

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient_of_keys: torch.Tensor, gradient_of_values: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return gradient_of_keys[:, :, ctx.unselected :], gradient_of_values[:, :, ctx.unselected :], None, None


def _token_major(*rows_1NRH: torch.Tensor) -> torch.Tensor:
    """All rows [1, N, sum of R, H], of which each lies as a projection leaves it."""
    return torch.cat([rows.transpose(1, 2) for rows in rows_1NRH], dim=1).transpose(1, 2)


def _both(keys_1NXH: torch.Tensor, values_1NXH: torch.Tensor) -> torch.Tensor | None:
    """[1, 2 X, N, H]: the memory in which values lie behind the keys; None where they do not."""
    _, heads, keys, head_dim = keys_1NXH.shape
    stride = keys_1NXH.stride()
    follow_each_other = values_1NXH.storage_offset() == keys_1NXH.storage_offset() + keys * stride[2]
    if not (share_memory(keys_1NXH, values_1NXH) and follow_each_other and stride == values_1NXH.stride()):
        return None
    return keys_1NXH.as_strided((1, 2 * keys, heads, head_dim), (2 * keys * stride[2], stride[2], stride[1], stride[3]))
