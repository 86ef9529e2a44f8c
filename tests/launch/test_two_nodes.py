"""Two machines, made of network namespaces: launch/multinode.sh scores and trains over them, one dying midway."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import assert_close_steps, steps

from tokenseek.config import load_config
from tokenseek.config.resources import find_resource
from tokenseek.runs.score import shard_folder
from tokenseek.runs.train import train

if os.geteuid() != 0:
    pytest.skip("network namespaces need root", allow_module_level=True)
if not shutil.which("ip"):
    pytest.skip("network namespaces need iproute2 (apt-get install iproute2)", allow_module_level=True)

pytestmark = pytest.mark.slow
COMMON = "selection.ratio=0.5"
SCRIPT = str(Path(__file__).parents[1] / "distributed" / "two_nodes.sh")


@pytest.fixture(scope="module")
def on_two_nodes(workspace):
    """Runs a script of launch/ on both machines, with the CPU twin of a shipped config."""

    def run(*arguments, config="multinode_ddp", kill_when=None):
        shipped = yaml.safe_load(find_resource("accelerate config", config).read_text())
        path = workspace.folder / f"{config}_cpu.yaml"
        path.write_text(yaml.safe_dump({**shipped, "use_cpu": True}))
        command = ["env", "DS_ACCELERATOR=cpu", SCRIPT, str(path), *map(str, arguments)]
        if kill_when:
            command.insert(1, f"KILL_WHEN={kill_when}")
        return workspace.finish(workspace.start(command, "nodes"), "nodes")

    return run


@pytest.fixture(scope="module")
def alone(workspace):
    """The run of one process that takes the batches of two."""
    output = workspace.folder / "one-node"
    settings = [COMMON, f"output_dir={output}", "training.gradient_accumulation_steps=4"]
    train(load_config(str(workspace.training), settings))
    assert len(steps(output)) == 6
    return output


def assert_same_steps(one, two):
    assert_close_steps(steps(two), steps(one))
    assert (two / "final" / "adapter_model.safetensors").exists()


def test_scoring_and_training_with_a_machine_that_dies(workspace, alone, on_two_nodes):
    output = workspace.folder / "nodes"
    arguments = ["--preset", workspace.training, "--set", COMMON, "--set", f"output_dir={output}"]
    # It is killed once two shards are finished, and again when a checkpoint is written; each time the whole launch ends
    # soon, and the same command goes on.
    shards = shard_folder(output / "index.arrow")
    killed = on_two_nodes("score", *arguments, kill_when=shards / "shard-00001.arrow")
    assert "killed the second machine" in killed.out
    if killed.status:
        assert "a host ended with status" in killed.err, killed
        assert not (output / "index.arrow").exists()
    whole = on_two_nodes("score", *arguments)
    assert whole.status == 0, whole
    assert (output / "index.arrow").read_bytes() == (alone / "index.arrow").read_bytes()

    killed = on_two_nodes("train", *arguments, kill_when=output / "checkpoint-4" / "trainer_state.json")
    assert killed.status != 0 and "a host ended with status" in killed.err, killed
    resumed = on_two_nodes("train", *arguments)
    assert resumed.status == 0, resumed
    assert_same_steps(alone, output)


def test_parameters_split_over_two_machines(workspace, alone, on_two_nodes):
    pytest.importorskip("deepspeed")
    output = workspace.folder / "nodes-zero3"
    settings = [COMMON, f"output_dir={output}", f"scoring.index={alone}/index.arrow"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    result = on_two_nodes("train", "--preset", workspace.training, *overrides, config="multinode_zero3")
    assert result.status == 0, result
    assert_same_steps(alone, output)
