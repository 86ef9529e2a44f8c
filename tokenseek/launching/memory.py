"""Peak memory of this process, on whatever it trains."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

from tokenseek.launching import environment


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
    """What is free on the GPU of this process; on CPUs, of the machine's memory the share of one of its processes."""
    if state.device.type == "cuda":
        return torch.cuda.mem_get_info(state.device)[0]
    return psutil.virtual_memory().available // environment.local_world_size()
