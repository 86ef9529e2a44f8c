"""The arithmetic and the words of the quickstart; its runs are those of every other test."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder, **values):
    summary = dict(seconds=100.0, steps=10, peak_memory_bytes=2**30, loss_before=2.0, loss_after=1.0) | values
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize(
    "seconds,ends,tokens,steps",
    [
        (12.0, [4.0, 8.0, 12.0], [50, 90, 140], 25),
        (16.0, [10.0, 17.0, 21.0], [50, 100, 150], 24),  # 84 s are left for steps of 4 s
        (16.0, [10.0, 17.0, 21.0], [50, 100, 140], 20),  # of 5 s, since these have a fourth more tokens
        (900.0, [300.0, 600.0, 900.0], [50, 100, 150], 1),
    ],
)
def test_as_many_steps_as_fit_into_the_seconds(quickstart, tmp_path, seconds, ends, tokens, steps):
    ordinary = write_run(tmp_path / "ordinary", seconds=100.0, tokens=500)
    probe = write_run(tmp_path / "probe", seconds=seconds, steps=3)
    found = enumerate(zip(ends, tokens, strict=True), 1)
    lines = [{"step": n, "seconds": end, "num_input_tokens_seen": seen, "loss": 1.0} for n, (end, seen) in found]
    lines = [{"step": 0, "seconds": 1.0}, *lines, {"step": 3, "seconds": ends[-1]}]  # as a run writes them
    (probe / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert quickstart.steps_for_seconds(ordinary, probe) == steps


@pytest.mark.parametrize("loss,learned", [(0.8, "more than"), (1.2, "less than"), (1.005, "as much as")])
def test_the_sentence_says_who_is_ahead(quickstart, tmp_path, capsys, loss, learned):
    ordinary = write_run(tmp_path / "ordinary")
    ours = write_run(tmp_path / "ours", steps=20, loss_after=loss, peak_memory_bytes=2**29)
    quickstart.report(ordinary, ours)
    printed = capsys.readouterr().out
    assert f"2.0 times the steps in 50% of the memory, and learned {learned} ordinary training" in printed
    assert "peak memory per process (MiB)                     1024         512    0.50" in printed


@pytest.mark.parametrize("seconds, told", [(104.0, "In as many seconds"), (117.0, "In 1.17 times the seconds")])
def test_the_sentence_says_if_the_seconds_differ(quickstart, tmp_path, capsys, seconds, told):
    quickstart.report(write_run(tmp_path / "ordinary"), write_run(tmp_path / "ours", seconds=seconds))
    assert f"{told} TokenSeek took 1.0 times the steps" in capsys.readouterr().out
