"""Tied weights have one gradient: the embedding adds its rows to that of the head, where they are.

Autograd would make a second matrix of the vocabulary's size, zeros but for the rows of the tokens at hand, to add it to
the head's. With small models these two are the peak of the whole step.

Shapes: N tokens looked up, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from tokenseek.decoder.find import Decoder, forward_replaced
from tokenseek.decoder.head import at_least_float32, is_partitioned

_EMBEDDING = inspect.signature(embedding)


@contextmanager
def one_gradient_of_tied_weights(decoder: Decoder) -> Iterator[None]:
    """For a forward pass whose output goes on through the head, without which the embedding's rows would be lost."""
    table: Any = decoder.causal_lm.get_input_embeddings()
    if not (torch.is_grad_enabled() and _is_tied(table, decoder.causal_lm.get_output_embeddings())):
        yield
        return
    forward = table.forward

    def lookup(*args: Any, **kwargs: Any) -> torch.Tensor:
        with _TiedLookup(table.weight):
            rows: torch.Tensor = forward(*args, **kwargs)
            return rows

    with forward_replaced(table, lookup):
        yield


def forget_tied_weights(decoder: Decoder) -> None:
    """Take away what the block above left on the weights."""
    for parameter in decoder.causal_lm.get_input_embeddings().parameters():
        if rows := parameter.__dict__.pop("_rows_to_add", None):
            rows.hook.remove()


def _is_tied(table: nn.Module, head: nn.Module) -> bool:
    """Whether both are plain layers of one trained weight that is here as a whole (not cut up by ZeRO-3 or DTensor)."""
    if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear) or table.weight is not head.weight:
        return False
    is_plain = table.max_norm is None and not table.scale_grad_by_freq and not table.sparse
    is_whole = type(table.weight) is nn.Parameter and not is_partitioned(table)
    # Only of a linear layer of its own is the weight's gradient known to belong to nobody else.
    return is_plain and is_whole and type(head).forward is nn.Linear.forward and table.weight.requires_grad


class _TiedLookup(TorchFunctionMode):
    """Looks rows up in `weight` for whatever embedding layer does so, scaled or not."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is embedding:
            given = _EMBEDDING.bind(*args, **(kwargs or {})).arguments
            if given["weight"] is self.weight:
                return _RowsOfTable.apply(self.weight, given["input"], given.get("padding_idx"))
        return func(*args, **(kwargs or {}))


class _RowsOfTable(torch.autograd.Function):
    """`embedding`, whose gradient waits for that of the head."""

    @staticmethod
    def forward(ctx: Any, weight: Any, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.ids, ctx.padding_idx = ids, padding_idx
        if not hasattr(weight, "_rows_to_add"):
            weight._rows_to_add = _RowsToAdd(weight)
        ctx.rows_to_add = weight._rows_to_add
        ctx.rows_to_add.rows.clear()  # those of a backward pass that broke off
        return embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ids_N, gradient_ND = ctx.ids.flatten(), gradient.flatten(0, -2)
        if ctx.padding_idx is not None:
            gradient_ND = gradient_ND.masked_fill(ids_N.eq(ctx.padding_idx)[:, None], 0)
        ctx.rows_to_add.rows.append((ids_N, gradient_ND))
        return None, None, None


class _RowsToAdd:
    """Rows of a weight's gradient, added when autograd hands over the rest of it: when all who use the weight are done.

    It stays on the weight, as hooks do, and like them is not copied with it.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hook = weight.register_hook(self._add)

    def _add(self, gradient_VD: torch.Tensor) -> None:
        for ids_N, rows_ND in self.rows:
            _add_rows(gradient_VD, ids_N, rows_ND)
        self.rows.clear()


def _add_rows(gradient_VD: torch.Tensor, ids_N: torch.Tensor, rows_ND: torch.Tensor) -> None:
    """In place, in one order; the rows of a token that occurs often are summed in float32 before."""
    ids_N, order_N = ids_N.sort(stable=True)
    is_first_N = torch.ones_like(ids_N, dtype=torch.bool)
    is_first_N[1:] = ids_N[1:] != ids_N[:-1]
    group_N = is_first_N.cumsum(0) - 1
    rows_ND = at_least_float32(rows_ND)[order_N]
    sums_ND = torch.zeros_like(rows_ND).index_put_((group_N,), rows_ND, accumulate=True)
    # Fewer groups than rows leave sums of zero behind; they go where they do no harm.
    token_N = ids_N.new_zeros(len(ids_N)).scatter_(0, group_N, ids_N)
    gradient_VD.index_put_((token_N,), sums_ND.to(gradient_VD.dtype), accumulate=True)
