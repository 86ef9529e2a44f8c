"""The wheel, installed beside the dependencies and used from outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv

import pytest
from conftest import ROOT
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model

from tokenseek.config.resources import list_resources
from tokenseek.data.toy import make_word_problems


def run(*command, folder):
    """Standard output of a command, in a folder outside the checkout and without a word of it in the environment."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an environment's programs, in which the wheel is installed as `pip install dist/*.whl` does it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    (wheel,) = folder.glob("tokenseek-*.whl")
    environment = folder / "environment"
    venv.create(environment)
    packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # The dependencies of the environment that runs the tests, less what it knows of a checkout: of a folder that is
    # named in a .pth file, no .pth file is read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", environment / "bin" / "python", "install", "--no-deps", wheel, folder=folder)
    return environment / "bin"


@pytest.mark.slow  # tests/versions.sh trains with the wheel too
def test_it_plans_and_trains_outside_the_checkout(installed, tmp_path):
    where = run(installed / "python", "-c", "import tokenseek; print(tokenseek.__file__)", folder=tmp_path)
    assert where.startswith(str(installed.parent))
    assert run(installed / "tokenseek", "presets", "--names", folder=tmp_path).split() == list_resources("preset")

    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", make_word_problems(8))
    write_jsonl(tmp_path / "heldout.jsonl", make_word_problems(4, seed=1))
    settings = [
        "model.name_or_path=model", "data.sources.0.path=train.jsonl", "eval_data.sources.0.path=heldout.jsonl",
        "training.max_steps=2", "output_dir=run",
    ]  # fmt: skip
    preset = ["--preset", "quickstart", *(word for setting in settings for word in ("--set", setting))]
    plan = run(installed / "tokenseek", "plan", *preset, "--json", "plan.json", folder=tmp_path)
    assert "MiB" in plan and json.loads((tmp_path / "plan.json").read_text())
    run(installed / "tokenseek", "train", *preset, "--accelerate-config", "ddp_cpu", folder=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
