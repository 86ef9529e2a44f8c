"""Training under each engine equals training in one process: losses, gradient norms, checkpoints, exported weights."""

import json
import shutil

import pytest
import torch
import yaml
from closeness import assert_close
from conftest import ACCELERATE, assert_close_steps, steps
from safetensors.torch import load_file

from tokenseek.config import load_config
from tokenseek.config.resources import find_resource
from tokenseek.runs.export import merge_adapter
from tokenseek.runs.train import train

pytest.importorskip("deepspeed")

FULL = ["peft=null", "training.learning_rate=1e-3", "training.weight_decay=0.1"]
DRAWN = ["selection.rule=sampled", "selection.alpha=0", "selection.explore=0.3", "selection.scope=supervised"]
ONLINE = ["scoring.mode=online", "scoring.reduction=l2", *DRAWN]
NF4 = ["model.quantization=nf4"]
KINDS = {
    "full": FULL,
    "lora": [],
    "bf16": ["training.mixed_precision=bf16"],
    "nf4": NF4,
    "nf4-bf16": [*NF4, "model.dtype=bfloat16", "model.double_quantization=true", "training.mixed_precision=bf16"],
    "nf4-online": [*NF4, *ONLINE, "selection.exact_layers=1"],
    "online": [*FULL, *ONLINE],
    "online-error": [*FULL, *ONLINE, "scoring.reduction=error"],
    "exact": [*FULL, *ONLINE, "selection.exact_layers=1"],
}
EXACT = ("full", "lora")  # resumed, exported and compared to the last digits; `nf4` too, where engines split weights
PACKED = ("nf4-bf16", "nf4-online")  # and these there alone
# Of losses and gradient norms. One process trains float32 weights under autocast, and so does DDP; ZeRO and FSDP2
# compute in bfloat16 throughout, with float32 master weights.
PRECISION = {
    **dict.fromkeys(("full", "lora", "online", "online-error", "exact"), dict(computed_in=torch.float32)),
    **dict.fromkeys(("bf16", "nf4-bf16"), dict(computed_in=torch.bfloat16, roundings=4)),
    **dict.fromkeys(("nf4", "nf4-online"), dict(computed_in=torch.float32, roundings=1024)),
}
# Examples that were cut before their response leave some micro batches without a loss.
COMMON = ["selection.ratio=0.5", "training.max_grad_norm=0.5"]
FILES = {"full": "model.safetensors", **dict.fromkeys(("lora", "nf4"), "adapter_model.safetensors")}


@pytest.fixture(scope="module")
def alone(workspace):
    """The runs of one process that takes the batches of two, one after the other."""
    outputs = {}
    for kind, overrides in KINDS.items():
        outputs[kind] = workspace.folder / "alone" / kind
        # Quantised, all would be scored anew: other weights.
        settings = [f"output_dir={outputs[kind]}", *index_of(workspace, "alone", kind)]
        settings += ["training.gradient_accumulation_steps=4", *COMMON, *overrides]
        train(load_config(str(workspace.training), settings))
    return outputs


def index_of(workspace, folder, kind):
    if "online" in kind or kind == "exact":
        return []
    return [f"scoring.index={workspace.folder}/{folder}/{kind if kind.startswith('nf4') else 'index'}.arrow"]


def launch(workspace, folder, config, runs, processes=2):
    """Train several times in one launch of CPU processes with a shipped accelerate config."""
    folder.mkdir(exist_ok=True)
    shipped = yaml.safe_load(find_resource("accelerate config", config).read_text())
    if config.startswith("zero"):
        ds_config = json.loads(find_resource("DeepSpeed config", config).read_text())
        if config.startswith("zero3"):
            # What models of many billion parameters make of it: nothing gathered stays for its next use.
            ds_config["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
            ds_config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        (folder / "ds.json").write_text(json.dumps(ds_config))
        shipped["deepspeed_config"]["deepspeed_config_file"] = str(folder / "ds.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**shipped, "use_cpu": True, "num_processes": processes}))
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["env", "DS_ACCELERATOR=cpu", *ACCELERATE, "--config_file", str(folder / "accelerate.yaml")]
    command += ["--main_process_port", "0", "tests/launch/train_several.py"]
    command += [str(workspace.training), str(folder / "runs.json")]
    result = workspace.finish(workspace.start(command, config), config)
    assert result.status == 0, result


def assert_same_steps(one, two, kind, first=0):
    """Losses and gradient norms of the steps behind the first few."""
    expected, got = steps(one)[first:], steps(two)
    assert [step for step, *_ in got] == [step for step, *_ in expected] == list(range(first + 1, 7))
    assert_close_steps(got, expected, **PRECISION[kind])


def assert_same_export(one, two, kind):
    """`final` holds one safetensors file of the same weights."""
    names = [path.name for path in (two / "final").iterdir() if path.suffix in (".safetensors", ".bin", ".pt")]
    assert names == [FILES[kind]]
    weights, exported = (load_file(run / "final" / FILES[kind]) for run in (one, two))
    assert_close(exported, weights)


# All that is in ddp_cpu.yaml is also in ddp.yaml but the devices.
# DeepSpeed compiles its optimizer on CPUs first, for minutes.
OFFLOAD = pytest.param("zero3_offload", marks=pytest.mark.slow)
# It differs from zero2 in where gradients live.
ZERO1 = pytest.param("zero1", marks=pytest.mark.slow)


@pytest.mark.parametrize("config", ["ddp_cpu", ZERO1, "zero2", "zero3", OFFLOAD, "fsdp2"])
def test_two_processes_equal_one(workspace, alone, config):
    folder = workspace.folder / config
    splits = config in ("zero3", "zero3_offload", "fsdp2")  # parameters
    kinds = [kind for kind in KINDS if splits or kind not in PACKED]
    exact = (*EXACT, "nf4") if splits else EXACT
    runs = {}
    for kind in kinds:
        # Under ZeRO-3, score a second time, where a training has told Transformers to partition whatever it loads.
        scored = "zero3" if (config, kind) == ("zero3", "lora") else "alone"
        settings = [*COMMON, *KINDS[kind], *index_of(workspace, scored, kind)]
        runs[kind] = {"output": str(folder / kind), "set": settings}
    resumed = [
        {**runs[kind], "output": str(folder / f"{kind}-resumed"), "resume": str(folder / kind / "checkpoint-4")}
        for kind in exact
    ]
    launch(workspace, folder, config, [*runs.values(), *resumed])

    for kind in kinds:
        assert max(norm for _, _, norm in steps(alone[kind])) > 0.5  # so that clipping takes place
        assert_same_steps(alone[kind], folder / kind, kind)
        summaries = [json.loads((f / "summary.json").read_text()) for f in (alone[kind], folder / kind)]
        for name in ("loss_before", "loss_after"):
            assert_close(summaries[1][name], summaries[0][name], **PRECISION[kind])
    for kind in exact:
        whole, resumed = steps(folder / kind), steps(folder / f"{kind}-resumed")
        assert_close_steps(resumed, whole[4:])  # norms are summed in any order
        for run in (folder / kind, folder / f"{kind}-resumed"):
            assert_same_export(alone[kind], run, kind)

    if splits:
        merged = []
        for run in (alone["nf4"], folder / "nf4"):
            merge_adapter(run / "final", folder / "merged" / run.parent.name)
            merged.append(load_file(folder / "merged" / run.parent.name / "model.safetensors"))
        assert_close(merged[1], merged[0])
        for kind in exact:
            for micro_batch in json.loads((folder / kind / "gathers.json").read_text()):
                for way, counts in micro_batch.items():
                    in_layers = [n for name, n in counts.items() if ".layers." in name]
                    assert in_layers and set(in_layers) == {2 if way == "both" else 1}, (kind, way, counts)
                    assert any(name.endswith("self_attn.q_proj.weight") for name in counts)  # packed, in `nf4`
    if config == "zero3":
        index = workspace.folder / "alone" / "index.arrow"
        assert (folder / "index.arrow").read_bytes() == index.read_bytes()

    if config in ("zero1", "zero3"):  # ddp: test_training_launches.py
        goes_on_with_other_processes(workspace, alone, folder, config, runs)
    shutil.rmtree(folder)


def goes_on_with_other_processes(workspace, alone, folder, config, runs):
    """One process goes on from the checkpoint of two, and two from that of one."""

    def run(kind, name, processes, checkpoint=None):
        settings = [*runs[kind]["set"], f"training.gradient_accumulation_steps={4 // processes}"]
        resume = f"{folder}/{kind}{checkpoint}/checkpoint-4" if checkpoint is not None else None
        return {"output": f"{folder}/{kind}{name}", "set": settings, "resume": resume}

    one = [run(kind, name, 1, source) for kind in EXACT for name, source in (("-one", None), ("-two-to-one", ""))]
    launch(workspace, folder, config, one, processes=1)
    launch(workspace, folder, config, [run(kind, "-one-to-two", 2, "-one") for kind in EXACT])
    for kind in EXACT:
        for name in ("-two-to-one", "-one-to-two"):
            assert_same_steps(alone[kind], folder / f"{kind}{name}", kind, first=4)
            assert_same_export(alone[kind], folder / f"{kind}{name}", kind)
