"""Keys and values of all tokens, recorded in a pass without gradient, to which a pass with gradient attends.

The second pass computes the keys and values of its own rows anew. They are written over the recorded ones, which hold
the same numbers: nothing is stored twice, and gradient reaches these rows alone.

Shapes: B batch, T tokens, R rows of a pass, N key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from tokenseek.ditching.cache import _OnceCache
from tokenseek.ditching.rows import Partition, Rows
from tokenseek.ditching.storage import Kept


class Recording:
    """Keys and values [B, N, T, H] of a model's layers, from one forward pass over all tokens.

    Args:
        storage: where they wait for the second pass, "device" or "host".
        unrecorded: layers that the second pass leaves out.
        exchange: from keys and values of the rows of this process to those of all tokens, where ranks share a text.

    Attributes:
        returns_tuple: whether layers return their hidden states in a tuple.
        border: what reaches the first of the layers left out in the second pass, [B, S, D].
    """

    def __init__(
        self, storage: str, unrecorded: tuple[nn.Module, ...] = (), exchange: Callable[..., tuple] | None = None
    ):
        self.storage, self.unrecorded, self.exchange = storage, unrecorded, exchange
        self._kept: dict[nn.Module, tuple[Kept, Kept]] = {}
        self.returns_tuple = False
        self.border: torch.Tensor | None = None

    def put(self, layer: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer not in self.unrecorded:
            self._kept[layer] = tuple(Kept(_alone(tensor.detach()), self.storage) for tensor in (keys, values))

    def take(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, for good: they belong to the caller."""
        keys, values = self._kept.pop(layer)
        return keys.restore(), values.restore()

    def beyond_border(self, hidden_BSD: torch.Tensor):
        """The output of a layer that is left out."""
        if self.border is None:
            self.border = hidden_BSD
        return (hidden_BSD,) if self.returns_tuple else hidden_BSD


class RecordingCache(_OnceCache):
    """Hands a layer the keys and values of all tokens back as they are, and keeps them."""

    def __init__(self, exchange: Callable[..., tuple] | None):
        super().__init__()
        self.exchange = exchange

    def update(self, keys_BNRH, values_BNRH, layer_idx, *args, **kwargs):
        whole = (keys_BNRH, values_BNRH) if self.exchange is None else self.exchange(keys_BNRH, values_BNRH)
        self._record(*whole, layer_idx)
        return whole


class RecordedCache(_OnceCache):
    """Returns the recorded keys and values, with those of the selected rows, which carry gradient, in their places."""

    def __init__(self, partition: Partition, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.partition, self.recorded = partition, (keys, values)

    def update(self, keys_BNSH, values_BNSH, layer_idx, *args, **kwargs):
        rows = self.partition.whole.selected
        own = self.partition.exchange(keys_BNSH, values_BNSH)
        written = [_Written.apply(whole, mine, rows) for whole, mine in zip(self.recorded, own, strict=True)]
        self._record(*written, layer_idx)
        return self.keys, self.values


class _Written(torch.autograd.Function):
    """`whole` with `mine` written into its `rows`, in place; they alone have a gradient."""

    @staticmethod
    def forward(ctx, whole_BNTH: torch.Tensor, mine_BNRH: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        rows.overwrite(whole_BNTH, mine_BNRH)
        return whole_BNTH.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_BNTH: torch.Tensor):
        gradient_BNRH = ctx.rows.take(gradient_BNTH.transpose(1, 2), 1).transpose(1, 2)
        if ctx.rows.padded:
            gradient_BNRH = gradient_BNRH.masked_fill(~ctx.rows.valid_BR[:, None, :, None], 0)
        return None, gradient_BNRH, None


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own: a view of a fused projection would keep the queries too."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone()
