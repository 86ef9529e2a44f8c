"""Bytes alive in a training step, by what they are for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
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


class Ledger(TorchDispatchMode):
    """Follows every storage that an operation in the block returns, until it is freed; real or fake.

    A storage counts in the category in which it was born (:attr:`region`) until it is moved to another.

    Args:
        clock: seconds since any moment, for averages over time.

    Attributes:
        region: category of what is born from now on.
        peak: the most bytes that were alive at once.
        at_peak: those bytes, by category.
        byte_seconds, seconds: of the time up to the last :meth:`note_time`; their quotient is the average.

    Example:
        >>> with Ledger() as ledger:
        ...     x = torch.zeros(1024)
        ...     del x
        >>> ledger.peak, ledger.at_peak["workspace"]
        (4096, 4096)
    """

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self.region = "workspace"
        self.alive = dict.fromkeys(CATEGORIES, 0)
        self.total = 0
        self.clock = clock
        self.reset_peak()
        self.reset_time()
        self._storages: dict[int, tuple[weakref.ref, int, str | None]] = {}

    def reset_peak(self) -> None:
        """Begin a new peak with what is alive now."""
        self.peak, self.at_peak = self.total, dict(self.alive)

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
        self.note_time()
        self.alive[category] += nbytes
        self.total += nbytes
        if self.total > self.peak:
            self.reset_peak()

    def track(self, tensors: Iterable[torch.Tensor], category: str | None) -> None:
        """Count the storages of `tensors` in `category`, wherever they were counted before; None: nowhere."""
        for tensor in tensors:
            self._put(tensor.untyped_storage(), category)

    def category_of(self, tensor: torch.Tensor) -> str | None:
        known = self._storages.get(id(tensor.untyped_storage()))
        return known and known[2]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._storages:
                    self._put(storage, self.region)
        return result

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
