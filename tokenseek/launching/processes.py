"""The processes of a launch.

Collectives here are short; what takes long is done by processes that do not wait for each other.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers.integrations import deepspeed as hf_deepspeed

from tokenseek.errors import UserError
from tokenseek.launching import environment
from tokenseek.launching.engine import kind_of, require_splittable

Result = TypeVar("Result")

_POLL_SECONDS = 0.1
_calls = itertools.count()  # the same in all processes, which make the same calls


def join_processes(patience: timedelta | None = None) -> PartialState:
    """Join the process group of this launch, on the devices that its accelerate config names.

    Args:
        patience: how long processes wait for each other in a collective; torch's own default if None.
    """
    environment.let_memory_segments_grow()
    # Told nothing, PartialState finds no GPU and makes each of several CPU processes believe that it is alone.
    cpu = environment.uses_cpu() or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, **({"timeout": patience} if patience else {}))
    launched = environment.world_size()
    if state.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but each of them sees {state.num_processes}. Launch with "
            "`accelerate launch --config_file` and one of accelerate_configs/, such as ddp.yaml, or ddp_cpu.yaml "
            "without GPUs."
        )
    return state


def leave_group() -> None:
    """Leave the process group, once all work of this process is done, and not with whatever the interpreter ends with.

    A process that had succeeded was seen to be aborted there.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def log_once(log: logging.Logger, state: PartialState, message: str) -> None:
    """Log at level INFO, in one process of every node."""
    if state.is_local_main_process:
        log.info(message)


def leave_launch() -> int:
    """Make every process of this launch one by itself, on its own device. Call it before a device is touched.

    Returns:
        The number of the process in the launch.

    Raises:
        UserError: the launch's engine is for processes that work together.
    """
    if found := environment.engines():
        raise UserError(
            f"{found[0]}: here every process trains a model of its own. Launch with ddp.yaml, ddp_cpu.yaml or "
            "single.yaml."
        )
    return environment.leave_processes()


def require_engine(state: PartialState, quantization: str | None) -> None:
    """Refuse a launch whose engine would not do what its accelerate config says.

    Raises:
        UserError: FSDP without GPUs, or quantised weights that the engine would split and cannot.
    """
    if environment.uses_fsdp() and state.device.type == "cpu":
        raise UserError(
            "FSDP was asked for, and there are no GPUs: accelerate would silently run DDP, with the whole model in "
            "every process. Launch with ddp_cpu.yaml, or with zero3.yaml, which splits parameters on CPUs too."
        )
    require_splittable(kind_of(environment.launched_config(state.device.type == "cpu")), quantization)


@contextmanager
def whole_models() -> Iterator[None]:
    """Models that are loaded inside are whole in every process, whatever engine the launch will train with.

    ZeRO-3 would split their parameters; FSDP's way of loading counts on the first process to fill in the others.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        with environment.without_fsdp_loading():
            yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def first_on_main(state: PartialState, work: Callable[[], Result]) -> Result:
    """`work()` in the first process of every node, then in the others, which find in caches what it has done.

    The others wait outside collectives, which NCCL ends after ten minutes: `work` may take longer.

    Raises:
        UserError: in every process, where a first one meets it; none is left waiting for another that has ended.
        RuntimeError: in the others, where a first one fails in another way.
    """
    if state.num_processes == 1:
        return work()
    call = next(_calls)
    per_node = environment.local_world_size(state.num_processes)
    first = range(0, state.num_processes, per_node)
    result: Any = None
    met: Exception | None = None
    if state.process_index in first:
        try:
            result = work()
        except Exception as error:
            met = error
        outcome = ["UserError" if isinstance(met, UserError) else "failed", str(met)] if met else ["done", ""]
        _store().set(_key(call, state.process_index), json.dumps(outcome))
        if met:
            raise met
    for process in first:
        while not _store().check([_key(call, process)]):
            time.sleep(_POLL_SECONDS)
        kind, message = json.loads(_store().get(_key(call, process)))
        if kind == "UserError":
            raise UserError(message)
        if kind == "failed":
            raise RuntimeError(f"process {process} failed: {message}")
    return result if state.process_index in first else work()


def meet(state: PartialState) -> None:
    """Return when every process has come here. None waits in a collective: some may take longer than its patience."""
    if state.num_processes == 1:
        return
    call = next(_calls)
    _store().set(_key(call, state.process_index), "here")
    everyone = [_key(call, process) for process in range(state.num_processes)]
    while not _store().check(everyone):
        time.sleep(_POLL_SECONDS)


def _store() -> dist.Store:
    """What the processes of this launch found each other by; its first process answers in a thread of its own."""
    return dist.distributed_c10d._get_default_store()


def _key(call: int, process: int) -> str:
    return f"tokenseek/call/{call}/{process}"
