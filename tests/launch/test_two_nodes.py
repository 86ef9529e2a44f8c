"""Two machines, made of network namespaces: launch/multinode.sh scores and trains over them, one dying midway."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import steps

from tokenseek.config import load_config
from tokenseek.resources import find_resource
from tokenseek.runs.score import shard_folder
from tokenseek.runs.train import train

if os.geteuid() != 0:
    pytest.skip("network namespaces need root", allow_module_level=True)
if not shutil.which("ip"):
    pytest.skip("network namespaces need iproute2 (apt-get install iproute2)", allow_module_level=True)

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parents[1] / "distributed" / "two_nodes.sh")


@pytest.fixture(scope="module")
def on_two_nodes(workspace):
    """Runs a script of launch/ on both machines, with the CPU twin of the shipped config."""
    config = yaml.safe_load(find_resource("accelerate config", "multinode_ddp").read_text())
    path = workspace.folder / "multinode_cpu.yaml"
    path.write_text(yaml.safe_dump({**config, "use_cpu": True}))

    def run(*arguments, kill_when=None):
        command = [SCRIPT, str(path), *map(str, arguments)]
        if kill_when:
            command = ["env", f"KILL_WHEN={kill_when}", *command]
        return workspace.finish(workspace.start(command, "nodes"), "nodes")

    return run


def test_scoring_and_training_with_a_machine_that_dies(workspace, on_two_nodes):
    output, alone = workspace.folder / "nodes", workspace.folder / "one-node"
    common = ["selection.ratio=0.5"]
    settings = [f"output_dir={alone}", "training.gradient_accumulation_steps=4", *common]
    train(load_config(str(workspace.training), settings))

    arguments = ["--preset", workspace.training, *(word for setting in common for word in ("--set", setting))]
    arguments += ["--set", f"output_dir={output}"]
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
    assert len(steps(alone)) == 6
    for two, one in zip(steps(output), steps(alone), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert (output / "final" / "adapter_model.safetensors").exists()
