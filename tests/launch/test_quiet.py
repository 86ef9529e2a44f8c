"""Warnings of libraries that a user can do nothing about do not reach the terminal."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_short_training_warns_of_nothing(workspace, tmp_path, kind):
    settings = [f"output_dir={tmp_path / 'run'}", "training.max_steps=2", "training.recompute=true"]
    if kind != "llama":
        model = tmp_path / "model"
        tiny_model(kind, vocab_size=512, max_position_embeddings=512).save_pretrained(model)
        for file in workspace.model.glob("token*"):
            (model / file.name).write_bytes(file.read_bytes())
        settings.append(f"model.name_or_path={model}")
    words = [word for setting in settings for word in ("--set", setting)]
    result = workspace.launch("train", "--preset", workspace.training, *words, processes=2)
    assert not [line for line in result.err.splitlines() if "warn" in line.lower()], result
