"""The processes of a launch.

Collectives here are short; what takes long is done by processes that do not wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from tokenseek.errors import UserError

Result = TypeVar("Result")


def join_processes() -> PartialState:
    """Join the process group of this launch, on the devices that its accelerate config names."""
    # Told nothing, PartialState finds no GPU and makes each of several CPU processes believe that it is alone.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but each of them sees {state.num_processes}. Launch with "
            "`accelerate launch --config_file` and one of accelerate_configs/, such as ddp.yaml, or ddp_cpu.yaml "
            "without GPUs."
        )
    return state


def first_on_main(state: PartialState, work: Callable[[], Result]) -> Result:
    """`work()` in the main process, then in the others, which find in caches what it has done.

    Raises:
        UserError: in every process, where the main one meets it; none is left waiting for another that has ended.
    """
    error = result = None
    if state.is_main_process:
        try:
            result = work()
        except UserError as met:
            error = met
    (error,) = broadcast_object_list([error])
    if error is not None:
        raise error
    return result if state.is_main_process else work()
