"""What is allocated over a block's time: on a CPU by storages, on CUDA by its allocator's trace."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
from tiny_preset import tiny_preset

from tokenseek.runs import allocation
from tokenseek.runs.allocation import Allocation, over_trace
from tokenseek.runs.train import train


def event(action: str, size: int, time_us: int) -> dict:
    return {"action": action, "size": size, "time_us": time_us}


def test_a_trace_of_cuda_s_allocator():
    events = [
        event("segment_alloc", 4096, 5),
        event("alloc", 100, 10),
        event("alloc", 300, 20),
        event("free_requested", 300, 50),
        event("free_completed", 300, 90),
        event("alloc", 50, 100),
    ]
    byte_seconds, seconds, peak = over_trace(events, allocated=1000)
    assert byte_seconds == pytest.approx((1100 * 10 + 1400 * 30 + 1100 * 50) / 1e6)
    assert (seconds, peak) == (pytest.approx(90 / 1e6), 1400)
    assert over_trace([], allocated=1000) == (0.0, 0.0, 1000)


def test_blocks_on_a_cpu_add_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock = count()  # every look at it is a second later
    monkeypatch.setattr(allocation.time, "perf_counter", lambda: float(next(clock)))
    held = [torch.zeros(256)]
    measured = Allocation(lambda: held)
    assert measured.average == 0
    with measured:
        pass  # 1 second of 1 KiB
    assert (measured.average, measured.peak) == (1024, 1024)
    with measured:
        born = torch.empty(256)  # after 1 s
        del born  # after 2 s, then 1 s more
    assert (measured.average, measured.peak) == ((1024 + 1024 + 2048 + 1024) // 4, 2048)


@pytest.mark.parametrize("method", ["full", "selected"])
def test_a_run_tells_the_average_and_the_peak_of_its_steps(tmp_path, method):
    settings = ["peft=null", "training.ditching=false"] if method == "full" else ["selection.rule=random"]
    config = tiny_preset(tmp_path, *settings)
    summary = train(config)
    weights = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    times = 3 if method == "full" else 1  # Adam's two moments
    assert times * weights * 0.9 < summary.average_memory_bytes < summary.step_peak_bytes
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step_peak_bytes"] == summary.step_peak_bytes
    assert "average memory per process" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_an_error_in_a_traced_step_ends_the_trace(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("in the step")

    monkeypatch.setattr("tokenseek.training.GroupTrainer.training_step", fails)
    with pytest.raises(RuntimeError, match="in the step"):
        train(tiny_preset(tmp_path, "selection.rule=random", "training.max_steps=1"))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_what_cannot_be_followed_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(allocation, "_PLAIN", set())
    summary = train(tiny_preset(tmp_path, "selection.rule=random"))
    assert (summary.average_memory_bytes, summary.step_peak_bytes) == (None, None)
