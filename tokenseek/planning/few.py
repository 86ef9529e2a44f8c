"""Of many parts that are alike, few are run: they stand for the others, in arithmetic and in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tokenseek.ditching.loss import EveryChunk
from tokenseek.planning.work import Work


def some_of(work: Work, parts: Sequence[Any]) -> Iterator[Any]:
    """Of a layer's tiles, or of the spans of its attention, the first and the last, each of which stands for half of
    them, and of an odd number the one in the middle for itself.

    Arithmetic grows evenly from one to the next, so that the sum is that of all; the first or the last holds the most.
    """
    outside, count = work.times, len(parts)
    standing_for = (
        {0: count // 2, count // 2: 1, count - 1: count // 2} if count % 2 else {0: count // 2, -1: count // 2}
    )
    if count == 1:
        standing_for = {0: 1}
    for number, times in standing_for.items() if count else ():
        work.times = outside * times
        yield parts[number]
    work.times = outside


class FewChunks(EveryChunk):
    """Of the head's chunks the first, which stands for those that follow it, and the last two, which hold the most."""

    def __init__(self, work: Work):
        self.work = work
        self._rows, self._flops, self._operations, self._seconds = 0, 0, Counter[tuple[float, int, bool]](), 0.0

    def borders(self, *borders: int) -> tuple[int, ...]:
        self._rows = 0
        return borders if len(borders) < 6 else (*borders[:2], *borders[-3:])

    def __call__(self, run: Callable[..., torch.Tensor], *chunk: Any) -> torch.Tensor:
        chunk_loss, hidden_CD, *more = chunk
        work, rows = self.work, len(hidden_CD)
        if self._rows and rows > self._rows:  # many of them
            times = rows // self._rows
            work.flops += times * self._flops
            work.operations.update({key: times * count for key, count in self._operations.items()})
            work.seconds += times * self._seconds
            return _SkippedChunk.apply(hidden_CD)
        flops, operations, seconds = work.flops, Counter(work.operations), work.seconds
        total = run(chunk_loss, hidden_CD, *more)
        if not self._rows:
            self._rows, self._flops, self._seconds = rows, work.flops - flops, work.seconds - seconds
            self._operations = work.operations - operations
        return total


class _SkippedChunk(torch.autograd.Function):
    """Keeps what a chunk keeps, the gradient of its hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_CD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(hidden_CD))
        return torch.empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (gradient_CD,) = ctx.saved_tensors
        return gradient_CD * gradient
