"""Training under DeepSpeed equals training in one process: losses, gradient norms, checkpoints, exported weights."""

import json
import shutil

import pytest
import yaml
from conftest import ACCELERATE, steps
from safetensors.torch import load_file

from tokenseek.config import load_config
from tokenseek.resources import find_resource
from tokenseek.runs.train import train

pytest.importorskip("deepspeed")

FULL = ["peft=null", "training.learning_rate=1e-3"]
KINDS = {"full": FULL, "lora": []}
# Examples that were cut before their response leave some micro batches without a loss.
COMMON = ["selection.ratio=0.5", "training.max_grad_norm=0.5"]
FILES = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def alone(workspace):
    """The runs of one process that takes the batches of two, one after the other."""
    outputs = {}
    for kind, overrides in KINDS.items():
        outputs[kind] = workspace.folder / "alone" / kind
        settings = [f"output_dir={outputs[kind]}", f"scoring.index={workspace.folder}/alone/index.arrow"]
        settings += ["training.gradient_accumulation_steps=4", *COMMON, *overrides]
        train(load_config(str(workspace.training), settings))
    return outputs


def launch(workspace, folder, config, runs):
    """Train several times in one launch of two CPU processes with a shipped accelerate config."""
    folder.mkdir()
    shipped = yaml.safe_load(find_resource("accelerate config", config).read_text())
    ds_config = json.loads(find_resource("DeepSpeed config", config).read_text())
    if config == "zero3":
        # What models of many billion parameters make of it: nothing gathered stays for its next use.
        ds_config["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        ds_config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    (folder / "ds.json").write_text(json.dumps(ds_config))
    shipped["deepspeed_config"]["deepspeed_config_file"] = str(folder / "ds.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**shipped, "use_cpu": True, "num_processes": 2}))
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["env", "DS_ACCELERATOR=cpu", *ACCELERATE, "--config_file", str(folder / "accelerate.yaml")]
    command += ["--main_process_port", "0", "tests/launch/train_several.py"]
    command += [str(workspace.training), str(folder / "runs.json")]
    result = workspace.finish(workspace.start(command, config), config)
    assert result.status == 0, result


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_two_processes_equal_one(workspace, alone, config):
    folder = workspace.folder / config
    runs = []
    for kind, overrides in KINDS.items():
        whole = {"output": str(folder / kind), "set": [*COMMON, *overrides]}
        # Under ZeRO-3, score a second time, where a training has told Transformers to partition whatever it loads.
        scored = "zero3" if (config, kind) == ("zero3", "lora") else "alone"
        whole["set"].append(f"scoring.index={workspace.folder}/{scored}/index.arrow")
        resumed = {**whole, "output": str(folder / f"{kind}-resumed"), "resume": f"{whole['output']}/checkpoint-4"}
        runs += [whole, resumed]
    launch(workspace, folder, config, runs)

    for kind in KINDS:
        expected, got = steps(alone[kind]), steps(folder / kind)
        assert len(expected) == 6 and max(norm for _, _, norm in expected) > 0.5  # so that clipping takes place
        for one, two in zip(expected, got, strict=True):
            assert two == pytest.approx(one, rel=1e-5)
        for whole, resumed in zip(got[4:], steps(folder / f"{kind}-resumed"), strict=True):
            assert resumed == pytest.approx(whole, rel=1e-6)  # norms of partitions are summed in any order
        summaries = [json.loads((f / "summary.json").read_text()) for f in (alone[kind], folder / kind)]
        for name in ("loss_before", "loss_after"):
            assert summaries[1][name] == pytest.approx(summaries[0][name], rel=1e-5)

        weights = load_file(alone[kind] / "final" / FILES[kind])
        for run in (folder / kind, folder / f"{kind}-resumed"):
            final = run / "final"
            assert [path.name for path in final.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")] == [
                FILES[kind]
            ]
            exported = load_file(final / FILES[kind])
            assert exported.keys() == weights.keys()
            for name, weight in weights.items():
                assert exported[name].shape == weight.shape
                assert (exported[name] - weight).abs().max() <= 1e-4 * weight.abs().max().clamp(min=1e-3), name

    if config == "zero3":
        index = workspace.folder / "alone" / "index.arrow"
        assert (folder / "index.arrow").read_bytes() == index.read_bytes()
        for kind in KINDS:
            for micro_batch in json.loads((folder / kind / "gathers.json").read_text()):
                for way in ("forward", "backward"):
                    in_layers = [n for name, n in micro_batch[way].items() if ".layers." in name]
                    assert in_layers and set(in_layers) == {1}, (kind, way, micro_batch[way])
    shutil.rmtree(folder)
