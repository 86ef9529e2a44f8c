"""Warnings of libraries that a user can do nothing about do not reach the terminal."""

from __future__ import annotations


def test_a_short_training_warns_of_nothing(workspace, tmp_path):
    settings = [f"output_dir={tmp_path / 'run'}", "training.max_steps=2", "training.recompute=true"]
    words = [word for setting in settings for word in ("--set", setting)]
    result = workspace.launch("train", "--preset", workspace.training, *words, processes=2)
    assert not [line for line in result.err.splitlines() if "warn" in line.lower()], result
