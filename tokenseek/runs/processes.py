"""The processes of a launch."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from tokenseek.errors import UserError


def join_processes() -> PartialState:
    """Join the process group of this launch, on the devices that its accelerate config names."""
    # Told nothing, PartialState finds no GPU and makes each of several CPU processes believe that it is alone.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but each of them sees {state.num_processes}. Launch with "
            "`accelerate launch --config_file` and one of accelerate_configs/, such as ddp.yaml, or ddp_cpu.yaml without GPUs."
        )
    return state
