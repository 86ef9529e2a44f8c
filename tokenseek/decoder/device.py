"""What tensors live on: the kind of device that a step is computed for, that of its tensors or, in a plan, that of the
run; and whose memory is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_planned: ContextVar[str | None] = ContextVar("_planned", default=None)


def kind_of(device: torch.device) -> str:
    """Whose kernels are to be chosen for tensors on `device`: "cpu", "cuda", ..."""
    return _planned.get() or device.type


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether these are views of one piece of memory."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own size: a view of a larger one would keep all of it."""
    is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone else tensor.clone()


def start_of_graph(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a graph begins: the leaf, and what enters the module, which is a view of it.

    What watches modules from outside (torch's `FlopCounterMode` and `ModuleTracker`) hangs hooks on their inputs that
    `torch.autograd.grad` refuses on a leaf.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        return leaf, leaf.view_as(leaf)


@contextmanager
def planned_for(kind: str | None) -> Iterator[None]:
    """Inside the block, kernels are chosen as on a device of this kind, wherever tensors are; None: as ever."""
    token = _planned.set(kind)
    try:
        yield
    finally:
        _planned.reset(token)
