"""Copies between a device and its host beside the device's own work.

A lane is a second stream of a GPU. What it copies belongs to the first, the current one: the lane begins a copy when
the current stream has done what it was given until then, the allocator is told that the lane uses the memory too, and
the current stream waits where it needs what was copied. Copies out and back run in one lane, one after the other, so
that what comes back has left before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch

from tokenseek.decoder.device import kind_of


class Lane(Protocol):
    """Where copies run; the current stream is the one that the device's own work is in."""

    def run(self, copy: Callable[[], object], on_device: torch.Tensor) -> Any:
        """Have `copy` run behind what the current stream was given; returns what to wait for.

        Args:
            on_device: that it reads or writes, of memory of the current stream.
        """

    def wait(self, until: Any) -> None:
        """The current stream goes on when the copy is done that :meth:`run` returned this for."""


class CudaLane:
    """Of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)

    def run(self, copy: Callable[[], object], on_device: torch.Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
        # Freed before the lane has come to it, the memory would go to someone else in the current stream.
        on_device.record_stream(self._stream)
        return self._stream.record_event()

    def wait(self, until: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(until)


class NoLane:
    """Copies run where they are called: in a plan, whose devices have no streams but the same tensors."""

    def run(self, copy: Callable[[], object], on_device: torch.Tensor) -> None:
        copy()

    def wait(self, until: None) -> None:
        pass


_cuda_lane = cache(CudaLane)
_replaced: list[Callable[[torch.device], Lane | None]] = []


@contextmanager
def lanes_made_by(make: Callable[[torch.device], Lane | None]) -> Iterator[None]:
    """Inside the block, lanes are those that `make` gives; a rehearsal without a GPU."""
    _replaced.append(make)
    try:
        yield
    finally:
        _replaced.remove(make)


def lane_of(device: torch.device) -> Lane | None:
    """Of the tensors on `device`; None where copies have nothing to run beside."""
    if _replaced:
        return _replaced[-1](device)
    if device.type == "cuda":
        return _cuda_lane(device)
    return NoLane() if kind_of(device) == "cuda" else None
