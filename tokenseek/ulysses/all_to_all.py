"""The exchanges between sequence-parallel ranks, with gradient, and a meter for their bytes.

An all-to-all is its own transpose: the gradient of what a rank received goes back to whom it came from.

Shapes: B batch, N heads, P ranks, n = N/P heads per rank, R rows per rank, H head dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Traffic:
    """What this rank sent to other ranks, by the purpose of the exchange; see :func:`measured`.

    Attributes:
        forward, backward: bytes.
        forward_calls, backward_calls: numbers of collectives.
    """

    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    forward_calls: dict[str, int] = field(default_factory=dict)
    backward_calls: dict[str, int] = field(default_factory=dict)


# Each with what an exchange stands for.
_meters: list[tuple[Traffic, Callable[[], int]]] = []


@contextmanager
def measured(times: Callable[[], int] = lambda: 1) -> Iterator[Traffic]:
    """Counts the bytes that leave this rank inside the block, at the collective; a rank's share to itself is free.

    Args:
        times: for how many exchanges the one that is made stands; asked at each.

    Example:
        >>> with measured() as traffic:
        ...     model(**batch).loss.backward()
        >>> sum(traffic.forward.values()), sum(traffic.backward.values())
    """
    meter = Traffic(), times
    _meters.append(meter)
    try:
        yield meter[0]
    finally:
        _meters.remove(meter)


def _count(direction: str, purpose: str, sent_bytes: int) -> None:
    for meter, times in _meters:
        for name, number in ((direction, sent_bytes), (f"{direction}_calls", 1)):
            by_purpose = getattr(meter, name)
            by_purpose[purpose] = by_purpose.get(purpose, 0) + times() * number


class _AllToAll(torch.autograd.Function):
    """Tensors [P, ...] whose p-th slice goes to rank p, in one collective; returns them with slices from rank p."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, purpose: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.purpose = group, purpose
        return _all_to_all(tensors, group, purpose, "forward")

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *_all_to_all(gradients, ctx.group, ctx.purpose, "backward")


def _all_to_all(
    tensors: Sequence[torch.Tensor], group: dist.ProcessGroup, purpose: str, direction: str
) -> tuple[torch.Tensor, ...]:
    ranks = group.size()
    sizes = [tensor[0].numel() for tensor in tensors]
    # Copied into a new buffer, and so made contiguous, which the collective takes for granted.
    sent = tensors[0].new_empty(ranks, sum(sizes))
    for tensor, part in zip(tensors, sent.split(sizes, dim=1), strict=True):
        part.view(tensor.shape).copy_(tensor)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    _count(direction, purpose, sent[1:].nbytes)
    parts = received.split(sizes, dim=1)
    return tuple(part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True))


def rows_to_heads(
    group: dist.ProcessGroup, interleaved: bool, *tensors: torch.Tensor, purpose: str = "attention"
) -> tuple[torch.Tensor, ...]:
    """Local rows of all heads -> all rows, in the order of the text, of this rank's heads; (B, N, R, H) each.

    N may differ from tensor to tensor; the p-th of P equal stretches of heads goes to rank p.

    Args:
        interleaved: see :class:`tokenseek.ulysses.layout.Shards`.
    """
    if group.size() == 1:
        return tensors
    # (B, N, R, H) -> (P, B, n, R, H) -> all-to-all -> (P, B, n, R, H) -> (B, n, P x R in text order, H)
    by_rank = [tensor.unflatten(1, (group.size(), -1)).movedim(1, 0) for tensor in tensors]
    order = (1, 2, 3, 0, 4) if interleaved else (1, 2, 0, 3, 4)
    return tuple(part.permute(order).flatten(2, 3) for part in _AllToAll.apply(group, purpose, *by_rank))


def heads_to_rows(
    group: dist.ProcessGroup, interleaved: bool, tensor: torch.Tensor, purpose: str = "attention"
) -> torch.Tensor:
    """All rows, in the order of the text, of this rank's heads -> local rows: (B, P x R, n, H) -> (B, R, N, H)."""
    ranks = group.size()
    if ranks == 1:
        return tensor
    # (B, P x R, n, H) -> (P, B, R, n, H) -> all-to-all -> (P, B, R, n, H) -> (B, R, P x n, H)
    by_rank = tensor.unflatten(1, (-1, ranks) if interleaved else (ranks, -1)).movedim(2 if interleaved else 1, 0)
    (received,) = _AllToAll.apply(group, purpose, by_rank)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _AllToAllRows(torch.autograd.Function):
    """Rows [sum(send), D], `send[p]` of them to rank p; returns [sum(receive), D]."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, purpose: str, rows: torch.Tensor, send: list[int], receive: list[int]
    ) -> torch.Tensor:
        ctx.arguments = group, purpose, send, receive
        return _exchange_rows(group, purpose, rows, send, receive, "forward")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group, purpose, send, receive = ctx.arguments
        return None, None, _exchange_rows(group, purpose, gradient, receive, send, "backward"), None, None


def _exchange_rows(
    group: dist.ProcessGroup, purpose: str, rows: torch.Tensor, send: list[int], receive: list[int], direction: str
) -> torch.Tensor:
    rows = rows.contiguous()
    received = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(received, rows, receive, send, group=group)
    others = sum(send) - send[group.rank()]
    _count(direction, purpose, others * rows.shape[1] * rows.element_size())
    return received


def exchange_rows(
    group: dist.ProcessGroup, rows_XD: torch.Tensor, send: list[int], receive: list[int], purpose: str = "regroup"
) -> torch.Tensor:
    """`send[p]` rows of [sum(send), D] to each rank p, `receive[p]` from it: [sum(receive), D], by sender."""
    return _AllToAllRows.apply(group, purpose, rows_XD, send, receive)
