"""Tuning through the launcher: processes share the runs, and a killed launch goes on where it was."""

import pytest
from conftest import TOKENSEEK, kill_tree, wait_until

from tokenseek.config import load_config
from tokenseek.sweeps.sweep import read_rows

TUNE = [*TOKENSEEK, "tune", "--accelerate-config", "ddp_cpu", "--num-processes", "2"]
GRID = ["--steps", "2", "--hold-out", "4", "--weights", "1,0", "--weights", "5,5", "--ratios", "0.2,0.4"]


@pytest.mark.slow  # what a sweep keeps is tested without a launch, in tests/unit/test_sweep.py
def test_a_killed_launch_of_two_goes_on_and_finds_what_one_process_finds(workspace, script):
    preset = ["--preset", str(workspace.preset), "--set", "data.limit=12"]
    output = workspace.folder / "tuned"
    rows_file = output / "tune" / "rows.jsonl"
    arguments = [*GRID, *preset, "--set", f"output_dir={output}"]
    command = [*TUNE, *arguments]
    process = workspace.start(command, "tune")
    wait_until(lambda: read_rows(rows_file), process)
    kill_tree(process)
    first = read_rows(rows_file)
    assert 0 < len(first) < 4
    result = workspace.finish(workspace.start(command, "tune"), "tune")
    assert result.status == 0, result
    assert result.out.count("left)") == 4 - len(first) and result.out.count("Chosen:") == 1, result
    rows = read_rows(rows_file)
    assert rows[: len(first)] == first and len(rows) == 4
    assert load_config(output / "tune" / "preset.yaml").selection.ratio in (0.2, 0.4)

    alone = workspace.folder / "tuned-alone"
    assert script("tune", *GRID, *preset, "--set", f"output_dir={alone}").status == 0
    losses = [
        {row["trial"]: row["loss_after"] for row in read_rows(folder / "tune" / "rows.jsonl")}
        for folder in (output, alone)
    ]
    assert losses[0] == losses[1]


def test_engines_that_split_a_model_are_refused(workspace):
    arguments = [*GRID, "--preset", workspace.preset, "--set", f"output_dir={workspace.folder / 'refused'}"]
    result = workspace.tokenseek("tune", "--accelerate-config", "zero2", "--num-processes", "1", *arguments)
    assert "deepspeed: here every process trains a model of its own" in result.refusal()
