"""What is allocated while something runs: on average over its time, and at most.

On CUDA the allocator's own trace tells, with the times of the host, which asks for memory ahead of the device. On a CPU
every storage that an operation returns is followed until it is freed, as in the planner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenseek.planning.ledger import Ledger

# Engines whose processes hold plain parameters, gradients and optimizer states.
_PLAIN = {DistributedType.NO, DistributedType.MULTI_CPU}


class Allocation(AbstractContextManager):
    """Adds up what is allocated by this process in blocks; the same object may be entered again.

    Args:
        held: tensors that are there when a block begins (on a CPU, where no allocator tells).

    Attributes:
        average: bytes over the time of all blocks.
        peak: the most at once in any of them.

    Example:
        >>> with Allocation(lambda: model.parameters()) as allocation:
        ...     model(ids)
        >>> allocation.average
    """

    def __init__(self, held: Callable[[], Iterable[torch.Tensor]]) -> None:
        self.held, self.peak = held, 0
        self._byte_seconds = self._seconds = 0.0
        self._ledger: Ledger | None = None

    @property
    def average(self) -> int:
        """Bytes over the traced time; 0 before the first trace."""
        return round(self._byte_seconds / self._seconds) if self._seconds else 0

    def __enter__(self) -> Allocation:
        if torch.cuda.is_available():
            self._before = torch.cuda.memory_allocated()
            torch.cuda.memory._record_memory_history(enabled="all", context=None, clear_history=True)
        else:
            self._ledger = Ledger(clock=time.perf_counter)
            self._ledger.__enter__()
            self._ledger.track(self.held(), "workspace")
            self._ledger.reset_time()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._ledger is None:
            device = torch.cuda.current_device()
            events = torch.cuda.memory._snapshot(device)["device_traces"][device]
            torch.cuda.memory._record_memory_history(enabled=None)
            self._add(*over_trace(events, self._before))
        else:
            self._ledger.note_time()
            self._ledger.__exit__(*exception)
            self._add(self._ledger.byte_seconds, self._ledger.seconds, self._ledger.peak)
            self._ledger = None

    def _add(self, byte_seconds: float, seconds: float, peak: int) -> None:
        self._byte_seconds += byte_seconds
        self._seconds += seconds
        self.peak = max(self.peak, peak)


def over_trace(events: Sequence[Mapping[str, Any]], allocated: int) -> tuple[float, float, int]:
    """Byte seconds, seconds and peak of a trace of CUDA's allocator, from its first event to its last.

    Args:
        events: with `action`, `size` in bytes and `time_us`.
        allocated: bytes before the first.
    """
    byte_microseconds, peak, before = 0.0, allocated, None
    for event in events:
        sign = {"alloc": 1, "free_requested": -1}.get(event["action"])
        if sign is None:
            continue
        before = event["time_us"] if before is None else before
        byte_microseconds += allocated * (event["time_us"] - before)
        before = event["time_us"]
        allocated += sign * event["size"]
        peak = max(peak, allocated)
    seconds = 0.0 if before is None else (before - _first_time(events)) / 1e6
    return byte_microseconds / 1e6, seconds, peak


def _first_time(events: Sequence[Mapping[str, Any]]) -> int:
    return next(event["time_us"] for event in events if event["action"] in ("alloc", "free_requested"))


class StepAllocation(TrainerCallback):
    """The allocation of a run's optimizer steps 2, 4, 8, ... (of its only step, where there is one).

    The first step is left out because it ends with more than it began with: the optimizer's states. On a CPU, steps of
    engines that hold weights in forms of their own (ZeRO, FSDP) and compiled steps are not followed.

    Args:
        compiled: whether parts of the model are.
    """

    def __init__(self, trainer: Trainer, compiled: bool) -> None:
        self.trainer, self.steps = trainer, 0
        self.allocation = Allocation(self._held)
        self._open = ExitStack()
        can_be_followed = PartialState().distributed_type in _PLAIN and not compiled
        self.possible = torch.cuda.is_available() or can_be_followed

    @property
    def average(self) -> int:
        """Bytes over the time of the traced steps; 0 where none was traced."""
        return self.allocation.average

    @property
    def peak(self) -> int:
        """The most bytes within the traced steps."""
        return self.allocation.peak

    def __enter__(self) -> StepAllocation:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()  # of a step that an error ended

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trace the steps 2, 4, 8, ..., or the only one."""
        self.steps += 1
        is_only = self.steps == 1 and state.max_steps - state.global_step == 1
        is_traced = self.steps > 1 and self.steps & (self.steps - 1) == 0
        if self.possible and (is_traced or is_only):
            self._open.enter_context(self.allocation)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the trace, if there is one."""
        self._open.close()

    def _held(self) -> Iterable[torch.Tensor]:
        model, optimizer = self.trainer.model, self.trainer.optimizer
        if model is None or optimizer is None:
            raise RuntimeError("A trainer at work has a model and an optimizer.")
        yield from model.parameters()
        yield from model.buffers()
        yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        for states in optimizer.state.values():
            yield from (value for value in states.values() if isinstance(value, torch.Tensor))
