"""Where keys and values wait for the backward pass: as they are, on the host, or in 8 bits.

Selected tokens attend to all T, so that every layer keeps the keys and values of all; with recomputation, or few
selected tokens, they are most of what a step stores.

Shapes: B batch, N key/value heads, T tokens, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

STORAGES = ("device", "host", "int8", "int8_host")

# What is done with the tensors that a storage, by its name, is made of.
Watch = Callable[[str, tuple[torch.Tensor, ...]], None]
_watching: list[Watch] = []


@contextmanager
def copies_watched(watch: Watch) -> Iterator[None]:
    """Calls `watch` with every copy that is made inside the block; a plan counts them so."""
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.remove(watch)


def _report(storage: str, *tensors: torch.Tensor) -> None:
    for watch in _watching:
        watch(storage, tensors)


class Kept:
    """A tensor [B, N, T, H] in storage: itself ("device"), a copy on the host, or 8 bits for each of its numbers, there
    or on the host ("int8_host").

    In 8 bits, every row of H numbers has a scale of its own, after the mean over the tokens is taken off.
    """

    def __init__(self, tensor: torch.Tensor, storage: str) -> None:
        self.storage = storage
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        self.dtype, self.device = tensor.dtype, tensor.device
        if storage == "device":
            self.numbers = tensor
        elif storage == "host":
            self.numbers = to_host(tensor.detach())
            _report(storage, self.numbers)
        else:
            self.numbers, self.scale, self.mean = to_int8(tensor.detach())
            if storage == "int8_host":
                self.numbers, self.scale = to_host(self.numbers), to_host(self.scale)
                _report("host", self.numbers, self.scale)
                _report("int8", self.mean)
            else:
                _report(storage, self.numbers, self.scale, self.mean)

    def restore(self) -> torch.Tensor:
        """The tensor again, with the strides that it had."""
        if self.storage == "device":
            return self.numbers
        restored = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        if self.storage == "host":
            return restored.copy_(self.numbers, non_blocking=True)
        numbers, scale = (x.to(self.device, non_blocking=True) for x in (self.numbers, self.scale))
        return torch.addcmul(self.mean, numbers, scale, out=restored)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that the device can write and read by itself, in the order of its own work."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def to_int8(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, N, T, H] int8; the scale [B, N, T, 1] of every row; and the mean [B, N, 1, H] that was taken off before.

    Some channels of keys are far from zero for all tokens, and would leave few of the 8 bits to the others of a row.
    """
    mean = tensor.mean(-2, keepdim=True)
    centred = tensor - mean
    scale = (centred.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(tensor.dtype).tiny)
    return centred.div_(scale).round_().to(torch.int8), scale, mean


class TakenOnce:
    """A tensor for a pass that is recomputed: itself the first time, from what was kept of it from then on."""

    def __init__(self, tensor: torch.Tensor, storage: str) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._kept = Kept(tensor, storage)

    def take(self) -> torch.Tensor:
        """The tensor; a restored one from the second time on."""
        tensor, self._tensor = self._tensor, None
        return self._kept.restore() if tensor is None else tensor


class saved_as_kept(saved_tensors_hooks):
    """What autograd saves inside the block of the tensors that `watched` returns, views included, is
    stored as :class:`Kept`."""

    def __init__(self, watched: Callable[[], tuple[torch.Tensor | None, ...]], storage: str) -> None:
        self._watched, self._storage = watched, storage
        self._shared: dict[int, _Shared] = {}
        super().__init__(self._pack, lambda packed: packed if isinstance(packed, torch.Tensor) else packed())

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._watched, self._shared = tuple, {}  # autograd holds on to `_pack`

    def _pack(self, saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        for tensor in self._watched():
            if tensor is not None and tensor.untyped_storage()._cdata == saved.untyped_storage()._cdata:
                if id(tensor) not in self._shared:
                    self._shared[id(tensor)] = _Shared(tensor, self._storage)
                return self._shared[id(tensor)].view_like(saved)
        return saved


class _Shared:
    """A tensor of which several operations saved a part. Restored once, it is freed when the last has its part."""

    def __init__(self, tensor: torch.Tensor, storage: str) -> None:
        self._kept = Kept(tensor, storage)
        self._users = self._served = 0
        self._restored: torch.Tensor | None = None

    def view_like(self, saved: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A function that returns what `saved`, a view of the tensor, was."""
        self._users += 1
        size, stride, offset = saved.size(), saved.stride(), saved.storage_offset() - self._kept.offset

        def view() -> torch.Tensor:
            restored = self._kept.restore() if self._restored is None else self._restored
            self._served += 1
            self._restored = None if self._served % self._users == 0 else restored
            return restored.as_strided(size, stride, offset)

        return view
