"""Peak memory of this process, on whatever it trains."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from tokenseek.launching import environment

# Of the control groups of Linux (version 2, version 1): the limit, what is in use, and of what kind.
_GROUPS = "/sys/fs/cgroup"
_CONTAINER_FILES = (
    (f"{_GROUPS}/memory.max", f"{_GROUPS}/memory.current", f"{_GROUPS}/memory.stat"),
    (
        f"{_GROUPS}/memory/memory.limit_in_bytes",
        f"{_GROUPS}/memory/memory.usage_in_bytes",
        f"{_GROUPS}/memory/memory.stat",
    ),
)


def reset_peak_memory() -> None:
    """Begin a new peak; on a CPU the resident memory of now is where it begins."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Bytes allocated on the GPU at the peak since the last reset; resident bytes of the process on a CPU (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: peak memory on CPUs is known on Linux only.")
    return 1024 * int(found[1])


def free_memory_bytes(state: PartialState) -> int:
    """What is free on the GPU of this process; on CPUs, of the machine's or container's memory one process's share."""
    if state.device.type == "cuda":
        return torch.cuda.mem_get_info(state.device)[0]
    available = psutil.virtual_memory().available
    limited = [left for files in _CONTAINER_FILES if (left := _left_in_container(*map(Path, files))) is not None]
    return min([available, *limited]) // environment.local_world_size()


def _left_in_container(limit: Path, used: Path, stat: Path) -> int | None:
    """Bytes that a container may still take; None where nothing limits it. Its cached files give way, and are free."""
    if not limit.is_file() or not (bound := limit.read_text().strip()).isdigit():
        return None  # no such control group, or "max"
    cached = re.search(r"^(?:total_)?inactive_file (\d+)$", stat.read_text(), re.MULTILINE)
    return max(0, int(bound) - int(used.read_text()) + (int(cached[1]) if cached else 0))
