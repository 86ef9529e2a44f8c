"""What `accelerate launch` tells its processes: the one reader of its environment variables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

_PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
_OF_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Processes of the launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size(default: int = 1) -> int:
    """Processes of the launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


def uses_cpu() -> bool:
    """Whether processes were told to train on CPUs."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def trains_on_cpu() -> bool:
    """Whether processes train on CPUs: they were told to, or there is no CUDA device."""
    return uses_cpu() or not torch.cuda.is_available()


def uses_fsdp() -> bool:
    """Whether accelerate was asked for FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def uses_deepspeed() -> bool:
    """Whether accelerate was asked for DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def has_parallelism_config() -> bool:
    """Whether accelerate was asked for parallelism of its own, of which sequence parallelism is one."""
    return parse_flag_from_env(_PARALLELISM)


def engines() -> list[str]:
    """The engines of the launch that make its processes work together, in the words of an accelerate config."""
    return [name.lower() for name in _ENGINES if parse_flag_from_env(f"ACCELERATE_USE_{name}")]


def sequence_attention() -> str:
    """`sp_attn_implementation` of the launch's `parallelism_config`."""
    return os.environ.get("PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION", "sdpa")


def zero_stage() -> int:
    """The ZeRO stage that this launch's accelerate config asks for; 0 without DeepSpeed."""
    if not uses_deepspeed():
        return 0
    settings = _deepspeed_settings()
    if (file := settings.get("deepspeed_config_file")) is None:
        return int(settings.get("zero_stage", 2))  # accelerate's default
    return json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)


def launched_config(on_cpu: bool) -> dict[str, Any]:
    """The accelerate config of this launch, with the keys that a file of it has, as far as processes are told of it."""
    config: dict[str, Any] = {"num_processes": world_size(), "use_cpu": on_cpu}
    if has_parallelism_config():
        config["parallelism_config"] = {name.lower(): value for name, value in os.environ.items()}
    if uses_deepspeed():
        config |= {"distributed_type": "DEEPSPEED", "deepspeed_config": _deepspeed_settings()}
    elif uses_fsdp():
        settings = {
            "fsdp_version": os.environ.get("FSDP_VERSION", 1),
            "fsdp_reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
            "fsdp_offload_params": parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
        }
        config |= {"distributed_type": "FSDP", "fsdp_config": settings}
    return config


def _deepspeed_settings() -> Mapping[str, str]:
    names = ("config_file", "zero_stage", "offload_optimizer_device", "offload_param_device")
    given = {name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none") for name in names}
    settings = {name: value for name, value in given.items() if value != "none"}
    return {"deepspeed_config_file": settings["config_file"]} if "config_file" in settings else settings


def let_memory_segments_grow() -> None:
    """Have CUDA's allocator grow its segments, unless the environment says otherwise. Call it before a GPU is touched.

    Numbers of selected and unselected rows are new in every step; segments of fixed sizes would fill up with gaps.
    """
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def leave_processes() -> int:
    """Forget the launch, on a device of this process's own; returns the number that the process had in it."""
    if world_size() == 1:
        return 0
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    for name in _OF_LAUNCH:
        os.environ.pop(name, None)
    if not uses_cpu():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank] if visible else str(local_rank)
    return rank


def without_parallelism_config() -> AbstractContextManager[None]:
    """Inside, no `parallelism_config` was given."""
    return _without(_PARALLELISM)


def without_fsdp_loading() -> AbstractContextManager[None]:
    """Inside, models are not loaded by the first process for the others."""
    return _without(_FSDP_LOADING)


@contextmanager
def _without(name: str) -> Iterator[None]:
    hidden = os.environ.pop(name, None)
    try:
        yield
    finally:
        if hidden is not None:
            os.environ[name] = hidden
