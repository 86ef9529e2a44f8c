"""Counting bytes by storage, so that views count once and no allocator stands in between.

What a kernel allocates for itself and frees before it returns is not seen; on CUDA the allocator's own peak is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({id(s): s.nbytes() for s in [t.untyped_storage() for t in tensors]}.values())


class LiveStorages(TorchDispatchMode):
    """Follows every storage that an operation in the block returns, until it is freed.

    Whatever keeps it alive counts: the autograd graph, the closures of checkpointing, or a forgotten reference.

    Attributes:
        bytes: of the storages alive now.
        peak: the most that were alive at once.

    Example:
        >>> with LiveStorages() as live:
        ...     x = torch.zeros(1024)
        ...     del x
        >>> live.bytes, live.peak
        (0, 4096)
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._ignored: list[torch.UntypedStorage] = []

    def ignore(self, tensors: Iterable[torch.Tensor]) -> LiveStorages:
        """Leave out storages that were there before the block, such as weights; operations return views of them."""
        self._ignored += [t.untyped_storage() for t in tensors]
        for storage in self._ignored:
            self._alive[id(storage)] = (weakref.ref(storage), 0)
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_):
            self.bytes -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, freed), nbytes)
        self.bytes += nbytes
        self.peak = max(self.peak, self.bytes)


class SavedActivations(saved_tensors_hooks):
    """Counts what autograd saves for the backward pass of a forward pass in the block; parameters are left out.

    Example:
        >>> with SavedActivations(model) as saved:
        ...     loss = model(ids, labels=ids).loss
        >>> saved.bytes
    """

    def __init__(self, model: nn.Module):
        self._parameters = {id(p.untyped_storage()) for p in model.parameters()}
        self._saved: dict[int, tuple[weakref.ref, int]] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedActivations:
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._parameters:
            self._saved[id(storage)] = (weakref.ref(storage), storage.nbytes())
        return tensor

    @property
    def bytes(self) -> int:
        """Of the distinct storages saved and still alive: what was saved and dropped again is not stored."""
        return sum(nbytes for reference, nbytes in self._saved.values() if reference() is not None)
