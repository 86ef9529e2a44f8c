"""Where keys and values wait for the backward pass: as they are, on the host, or in 8 bits.

Selected tokens attend to all T, so that every layer keeps the keys and values of all; with recomputation, or few
selected tokens, they are most of what a step stores. Copies to the host and back run beside the device's own work, and
those of a layer are on their way back while the layer before it, in the order of the pass, is at work.

Shapes: B batch, N key/value heads, T tokens, H head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from tokenseek.decoder.device import share_memory
from tokenseek.ditching.lanes import Lane, lane_of

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


class Shelf:
    """Where what is kept of one step stands in order, layer by layer, so that the next layer's can be fetched ahead.

    Args:
        last_first: it is taken in the order of a backward pass.
    """

    def __init__(self, last_first: bool = True) -> None:
        self._step = -1 if last_first else 1
        self._boards: list[list[weakref.ref[Kept]]] = []

    def board(self) -> Board:
        """For what is kept of the next layer."""
        self._boards.append([])
        return Board(self, len(self._boards) - 1)

    def put(self, place: int, kept: Kept) -> None:
        self._boards[place].append(weakref.ref(kept))

    def fetch_ahead(self, place: int) -> None:
        """What else is kept of the layer at `place`, and of the one that comes after it."""
        for board in (place, place + self._step):
            for reference in self._boards[board] if 0 <= board < len(self._boards) else ():
                kept = reference()
                if kept is not None:
                    kept.fetch_ahead()


class Board(NamedTuple):
    """A layer's place on its shelf."""

    shelf: Shelf
    place: int


class Kept:
    """A tensor [B, N, T, H] in storage: itself ("device"), a copy on the host, or 8 bits for each of its numbers, there
    or on the host ("int8_host").

    In 8 bits, every row of H numbers has a scale of its own, after the mean over the tokens is taken off.

    Args:
        board: of the layer that it is kept for; by default it is fetched from the host when it is asked for.
        seen: [X], those of the T tokens that are kept; zeros are restored in the place of the others. All by default.
    """

    def __init__(
        self, tensor: torch.Tensor, storage: str, board: Board | None = None, seen: torch.Tensor | None = None
    ) -> None:
        self.storage, self._board, self._seen = storage, board, seen
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        self.dtype, self.device = tensor.dtype, tensor.device
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._away: tuple[Away, ...] = ()
        self._was_restored = False
        if seen is not None:
            tensor = tensor.detach().index_select(2, seen)
        self._kept_size, self._kept_stride = tensor.size(), tensor.stride()
        if storage == "device":
            self._tensors = (tensor,)
            if seen is not None:
                _report(storage, tensor)
        elif storage == "host":
            self._away = (Away(tensor.detach()),)
            _report(storage, *(away.on_host for away in self._away))
        else:
            numbers, scale, mean = to_int8(tensor.detach())
            if storage == "int8_host":
                self._tensors, self._away = (mean,), (Away(numbers), Away(scale))
                _report("host", *(away.on_host for away in self._away))
                _report("int8", mean)
            else:
                self._tensors = (mean, numbers, scale)
                _report(storage, *self._tensors)
        if board is not None and self._away:
            board.shelf.put(board.place, self)

    def restore(self) -> torch.Tensor:
        """The tensor again, with the strides that it had."""
        kept = self._restore()
        if self._seen is None:
            return kept
        restored = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device).zero_()
        return restored.index_copy_(2, self._seen, kept)

    def _restore(self) -> torch.Tensor:
        if self.storage == "device":
            return self._tensors[0]
        self._was_restored = True
        for away in self._away:
            away.fetch()
        if self._board is not None and self._away:
            self._board.shelf.fetch_ahead(self._board.place)
        back = [away.fetched() for away in self._away]
        if self.storage == "host":
            return back[0]
        mean, numbers, scale = *self._tensors, *back
        restored = torch.empty_strided(self._kept_size, self._kept_stride, dtype=self.dtype, device=self.device)
        return torch.addcmul(mean, numbers, scale, out=restored)

    def fetch_ahead(self) -> None:
        """Begin to bring it back from the host, unless it has been there and back."""
        if not self._was_restored:
            for away in self._away:
                away.fetch()


class Away:
    """A tensor's copy in host memory that the device can write and read by itself, beside its other work.

    Attributes:
        on_host: the copy, which the host itself must not read: it may not have arrived.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._lane = lane_of(tensor.device)
        self._size, self._stride, self._device = tensor.size(), tensor.stride(), tensor.device
        self.on_host = to_host(tensor, self._lane)
        self._coming: tuple[torch.Tensor, Any] | None = None

    def fetch(self) -> None:
        """Begin to copy it back, unless it is on its way."""
        if self._lane is None or self._coming is not None:
            return
        back = torch.empty_strided(self._size, self._stride, dtype=self.on_host.dtype, device=self._device)
        until = self._lane.run(lambda: back.copy_(self.on_host, non_blocking=True), back)
        self._coming = back, until

    def fetched(self) -> torch.Tensor:
        """The tensor on its device again, with the strides that it had."""
        if self._lane is None:
            back = torch.empty_strided(self._size, self._stride, dtype=self.on_host.dtype, device=self._device)
            return back.copy_(self.on_host)
        self.fetch()
        assert self._coming is not None
        (back, until), self._coming = self._coming, None
        self._lane.wait(until)
        return back


def to_host(tensor: torch.Tensor, lane: Lane | None = None) -> torch.Tensor:
    """A copy in host memory, in the order of the tensor's own, so that it travels as one block.

    Args:
        lane: that copies; nobody waits for it.
    """
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    if lane is None:
        return copy.copy_(tensor)
    lane.run(lambda: copy.copy_(tensor, non_blocking=True), tensor)
    return copy


def to_int8(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, N, T, H] int8; the scale [B, N, T, 1] of every row; and the mean [B, N, 1, H] that was taken off before.

    Some channels of keys are far from zero for all tokens, and would leave few of the 8 bits to the others of a row.
    """
    mean = tensor.mean(-2, keepdim=True)
    centred = tensor - mean
    scale = (centred.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(tensor.dtype).tiny)
    return centred.div_(scale).round_().to(torch.int8), scale, mean


class TakenOnce:
    """A tensor for a pass that is recomputed: itself the first time, from what was kept of it from then on.

    Who takes it may write over rows of it, also while it is copied to the host, which then gets the one or the other:
    the same rows are written over again when it is taken again.
    """

    def __init__(
        self, tensor: torch.Tensor, storage: str, board: Board | None = None, seen: torch.Tensor | None = None
    ) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._kept = Kept(tensor, storage, board, seen)

    def take(self) -> torch.Tensor:
        """The tensor; a restored one from the second time on."""
        tensor, self._tensor = self._tensor, None
        return self._kept.restore() if tensor is None else tensor


class saved_as_kept(saved_tensors_hooks):
    """What autograd saves inside the block of the tensors that `watched` returns, views included, is
    stored as :class:`Kept`, of which `seen` are looked at (all by default)."""

    def __init__(
        self,
        watched: Callable[[], tuple[torch.Tensor | None, ...]],
        storage: str,
        board: Board | None = None,
        seen: torch.Tensor | None = None,
    ) -> None:
        self._watched, self._storage, self._board, self._seen = watched, storage, board, seen
        self._shared: dict[int, _Shared] = {}
        super().__init__(self._pack, lambda packed: packed if isinstance(packed, torch.Tensor) else packed())

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._watched, self._shared = tuple, {}  # autograd holds on to `_pack`

    def _pack(self, saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        for tensor in self._watched():
            if tensor is not None and share_memory(tensor, saved):
                if id(tensor) not in self._shared:
                    self._shared[id(tensor)] = _Shared(tensor, self._storage, self._board, self._seen)
                return self._shared[id(tensor)].view_like(saved)
        return saved


class _Shared:
    """A tensor of which several operations saved a part. Restored once, it is freed when the last has its part."""

    def __init__(self, tensor: torch.Tensor, storage: str, board: Board | None, seen: torch.Tensor | None) -> None:
        self._kept = Kept(tensor, storage, board, seen)
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
