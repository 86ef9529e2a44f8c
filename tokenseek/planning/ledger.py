"""Bytes alive in a training step, by what they are for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = {
    "parameters": "weights kept on the device, and those gathered for the layer at work",
    "gradients": "gradients of the trained weights, with the buckets in which they travel",
    "optimizer": "the optimizer's states and master weights",
    "activations": "what autograd keeps for the backward pass",
    "keys_values": "keys and values that attention keeps for the backward pass",
    "logits": "the head: logits, their softmax and their gradients",
    "workspace": "what is needed for a moment only",
}
# Category of what is in the host's memory and no part of the sum.
HOST = "host"


@dataclass(frozen=True)
class Stretch:
    """A stretch of a step, from one mark to the next.

    Attributes:
        peak, parts: the most bytes alive in it, and those by category.
        seconds: by the ledger's clock.
        average: bytes alive over that time.
    """

    name: Hashable
    peak: int
    parts: dict[str, int]
    seconds: float
    average: float


class Ledger(TorchDispatchMode):
    """Follows every storage that an operation in the block returns, until it is freed; real or fake.

    A storage counts in the category in which it was born (:attr:`region`) until it is moved to another.

    Args:
        clock: seconds since any moment, for averages over time.

    Attributes:
        region: category of what is born from now on.
        peak: the most bytes that were alive at once.
        at_peak: those bytes, by category.
        host_peak: the most bytes that were in the host's memory at once.
        byte_seconds, seconds: of the present stretch up to the last :meth:`note_time`; their quotient is its average.

    Example:
        >>> with Ledger() as ledger:
        ...     x = torch.zeros(1024)
        ...     del x
        >>> ledger.peak, ledger.at_peak["workspace"]
        (4096, 4096)
    """

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self.clock = clock
        self.region = "workspace"
        self.alive = dict.fromkeys(CATEGORIES, 0)
        self.total = self.host = self.host_peak = 0
        self.reset_peak()
        self._storages: dict[int, tuple[weakref.ref, int, str | None]] = {}

    def reset_peak(self, name: Hashable = None) -> None:
        """Start over with what is alive now, with a stretch called `name`."""
        self._ended: list[Stretch] = []
        self.host_peak = self.host
        self._begin(name)

    def mark(self, name: Hashable) -> None:
        """End a stretch of the step here, and begin one called `name`."""
        self._ended.append(self._stretch)
        self._begin(name)

    @property
    def stretches(self) -> list[Stretch]:
        """Those that have ended, and the present one."""
        return [*self._ended, self._stretch]

    @property
    def peak(self) -> int:
        """The most bytes that were held at once."""
        return self._highest.peak

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by category, when most were held."""
        return self._highest.parts

    @property
    def _highest(self) -> Stretch:
        return max(self.stretches, key=lambda stretch: stretch.peak)

    def _begin(self, name: Hashable) -> None:
        self._name, self._high, self._at_high = name, self.total, dict(self.alive)
        self.reset_time()

    @property
    def _stretch(self) -> Stretch:
        self.note_time()
        average = self.byte_seconds / self.seconds if self.seconds else float(self.total)
        return Stretch(self._name, self._high, self._at_high, self.seconds, average)

    def reset_time(self) -> None:
        """Begin a new average now."""
        self.byte_seconds, self.seconds, self._noted = 0.0, 0.0, self.clock()

    def note_time(self) -> None:
        """What is alive now has been since the last change."""
        now = self.clock()
        self.byte_seconds += self.total * (now - self._noted)
        self.seconds += now - self._noted
        self._noted = now

    def add(self, category: str, nbytes: int) -> None:
        """Count bytes (or discount, where negative) that no tensor of this process stands for."""
        if category == HOST:
            self.host += nbytes
            self.host_peak = max(self.host_peak, self.host)
            return
        self.note_time()
        self.alive[category] += nbytes
        self.total += nbytes
        if self.total > self._high:
            self._high, self._at_high = self.total, dict(self.alive)

    def track(self, tensors: Iterable[torch.Tensor], category: str | None) -> None:
        """Count the storages of `tensors` in `category` (or :data:`HOST`), wherever they were before; None: nowhere."""
        for tensor in tensors:
            self._put(tensor.untyped_storage(), category)

    def category_of(self, tensor: torch.Tensor) -> str | None:
        """That of a tensor's storage; None of one that is not on the ledger."""
        known = self._storages.get(id(tensor.untyped_storage()))
        return known and known[2]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self._see(tensor)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._storages:
            self._put(storage, self.region)

    def _put(self, storage: torch.UntypedStorage, category: str | None) -> None:
        key = id(storage)
        if key in self._storages:
            reference, nbytes, before = self._storages[key]
            self._storages[key] = (reference, nbytes, category)
            if before == category:
                return
            if before:
                self.add(before, -nbytes)
        else:
            nbytes = storage.nbytes()
            self._storages[key] = (weakref.ref(storage, lambda _: self._freed(key)), nbytes, category)
        if category:
            self.add(category, nbytes)

    def _freed(self, key: int) -> None:
        _, nbytes, category = self._storages.pop(key)
        if category:
            self.add(category, -nbytes)


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
