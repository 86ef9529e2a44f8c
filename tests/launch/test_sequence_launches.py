"""Sequence parallelism through the launcher: a preset takes the same steps whether ranks share its texts or not."""

import json
import signal

import numpy as np
import pytest
import torch
import yaml
from closeness import assert_close
from conftest import ACCELERATE, assert_close_steps, metrics, steps, wait_until, workers
from safetensors.torch import load_file
from train_several import main as train_several

from tokenseek.config.resources import find_resource
from tokenseek.index import TokenIndex

FULL = ["peft=null", "training.learning_rate=1e-3"]
DRAWN = ["selection.rule=sampled", "selection.alpha=0", "selection.explore=0.3", "selection.scope=supervised"]
ONLINE = ["scoring.mode=online", "scoring.reduction=l2", "selection.exact_layers=1", *DRAWN]
KINDS = {
    "lora": [],
    "full": FULL,
    "packed": [*FULL, "training.packing=true"],
    "packed-online": [*FULL, "training.packing=true", "scoring.index=null", *ONLINE],
    "all-tokens": [*FULL, "training.ditching=false"],
}
# Stock Ulysses, and the paper's regrouping.
LAYOUTS = {"all-tokens": "contiguous", "full": "regroup"}
# Clipping takes place; some micro batches are without a loss, since examples were cut before their response.
COMMON = ["selection.ratio=0.5", "training.max_grad_norm=0.5"]
# Seven held-out examples leave room in the last batch.
COMMON += ["training.eval_strategy=steps", "training.eval_steps=5", "training.per_device_eval_batch_size=2"]
FILES = {**dict.fromkeys(KINDS, "model.safetensors"), "lora": "adapter_model.safetensors"}


def launch(workspace, folder, config, runs, processes=None, **changes):
    """Train several times in one launch with a shipped accelerate config, changed a little."""
    folder.mkdir(exist_ok=True)
    shipped = yaml.safe_load(find_resource("accelerate config", config).read_text())
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**shipped, **changes}))
    (folder / "runs.json").write_text(json.dumps(runs))
    command = ["env", "DS_ACCELERATOR=cpu", *ACCELERATE, "--config_file", str(folder / "accelerate.yaml")]
    command += ["--num_processes", str(processes)] if processes else []
    command += ["--main_process_port", "0", "tests/launch/train_several.py"]
    command += [str(workspace.training), str(folder / "runs.json")]
    name = f"sp-{folder.name}"
    result = workspace.finish(workspace.start(command, name), name)
    assert result.status == 0, result
    return result


def settings(workspace, *overrides):
    return [f"scoring.index={workspace.folder}/unshared/lora/index.arrow", *COMMON, *overrides]


def runs_of(workspace, folder, kinds, *overrides):
    return [{"output": str(folder / kind), "set": settings(workspace, *KINDS[kind], *overrides)} for kind in kinds]


@pytest.fixture(scope="module")
def unshared(workspace):
    """In this process, which shares its texts with no other."""
    folder = workspace.folder / "unshared"
    train_several(str(workspace.training), runs_of(workspace, folder, KINDS))
    return folder


@pytest.fixture(scope="module")
def shared(workspace, unshared):
    """The same runs where two processes share every text, a resumed one, and one that scores."""
    folder = workspace.folder / "shared"
    runs = runs_of(workspace, folder, KINDS)
    for run, kind in zip(runs, KINDS, strict=True):
        run["set"].append(f"training.sequence_layout={LAYOUTS.get(kind, 'balanced')}")
    runs.append({**runs[0], "output": str(folder / "resumed"), "resume": f"{folder}/lora/checkpoint-8"})
    runs.append({**runs[0], "output": str(folder / "taken-over"), "resume": f"{unshared}/lora/checkpoint-4"})
    for name, index in (("scored", [f"scoring.index={folder}/index.arrow"]), ("unscored", [])):
        runs.append({"output": str(folder / name), "set": settings(workspace, "training.max_steps=1", *index)})
    result = launch(workspace, folder, "sp2_cpu", runs)
    assert result.out.count("scoring the data first") == 1
    return folder


def assert_same_run(one, two, file, groups=1):
    """Losses and norms of every step, what was counted, held-out losses and the final weights."""
    assert_close_steps(steps(two), steps(one))
    one_summary, two_summary = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    assert two_summary["tokens"] == one_summary["tokens"] > 0
    for name in ("loss_before", "loss_after", "train_loss"):
        assert_close(two_summary[name], one_summary[name], torch.float32)
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line.get("num_input_tokens_seen") == other.get("num_input_tokens_seen")
    if groups == 1:  # Trainer's own held-out loss is a mean of means over the batches that are in work at once
        evaluated = [[line["eval_loss"] for line in metrics(run) if "eval_loss" in line] for run in (one, two)]
        assert evaluated[0]
        assert_close(evaluated[1], evaluated[0], torch.float32)
    samples = [run["train_samples_per_second"] * run["train_runtime"] for run in (metrics(one)[-1], metrics(two)[-1])]
    assert samples[1] == pytest.approx(samples[0], rel=0.05)  # both are rounded
    assert_close(load_file(two / "final" / file), load_file(one / "final" / file))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_share_texts_take_the_steps_of_one_process(kind, unshared, shared):
    taken = steps(unshared / kind)
    assert len(taken) == 12 and max(norm for _, _, norm in taken) > 0.5
    assert_same_run(unshared / kind, shared / kind, FILES[kind])
    one, two = (metrics(folder / kind)[-1]["total_flos"] for folder in (unshared, shared))
    assert_close(two, one, torch.float32)


def test_the_ranks_exchange_what_their_layouts_say(unshared, shared):
    """Equal losses would be no news from ranks that each did all the work."""
    sent = {kind: json.loads((shared / kind / "traffic.json").read_text()) for kind in [*KINDS, "scored", "unscored"]}
    for kind in KINDS:
        alone = json.loads((unshared / kind / "traffic.json").read_text())
        assert alone and not any(alone.values())
        assert sent[kind]["backward"]["attention"] > 0
    assert set(sent["full"]["forward"]) == {"attention", "regroup"}
    assert set(sent["lora"]["forward"]) == set(sent["all-tokens"]["forward"]) == {"attention"}
    # Half of the tokens are selected; training on all sends all of them back.
    assert sent["lora"]["backward"]["attention"] < 0.6 * sent["all-tokens"]["backward"]["attention"]
    assert sent["scored"]["backward"]["attention"] > sent["unscored"]["backward"]["attention"]


def test_the_shared_runs_are_apart_from_each_other(unshared):
    lora, full, everything = (np.array(steps(unshared / kind))[:, 1] for kind in ("lora", "full", "all-tokens"))
    assert np.abs(full - everything).min() > 1e-3 and np.abs(lora - full)[1:].max() > 1e-3


def test_a_resumed_run_goes_on(shared, unshared):
    assert_close_steps(steps(shared / "resumed"), steps(shared / "lora")[8:])
    # Two that share texts go on where one process was.
    assert_close_steps(steps(shared / "taken-over"), steps(unshared / "lora")[4:])


def assert_same_scores(one, two):
    one, two = TokenIndex.open(one), TokenIndex.open(two)
    assert len(one) == len(two) and one.header.scoring == two.header.scoring
    for row in range(len(one)):
        for expected, got in zip(one.scores(row), two.scores(row), strict=True):
            assert_close(got, expected)


def test_two_ranks_that_share_texts_score_as_one_process(unshared, shared):
    assert_same_scores(unshared / "lora" / "index.arrow", shared / "index.arrow")


@pytest.fixture(scope="module")
def of_two_groups(workspace, unshared):
    """One process that takes the batches of two groups as one."""
    folder = workspace.folder / "of-two-groups"
    runs = runs_of(workspace, folder, KINDS, "training.per_device_train_batch_size=4")
    train_several(str(workspace.training), runs)
    return folder


@pytest.mark.slow
def test_two_groups_of_two_see_different_examples(workspace, of_two_groups):
    folder = workspace.folder / "two-by-two"
    runs = runs_of(workspace, folder, KINDS)
    runs.append({**runs[0], "output": str(folder / "resumed"), "resume": f"{folder}/lora/checkpoint-4"})
    scored = [f"scoring.index={folder}/index.arrow", "training.max_steps=1"]
    runs.append({"output": str(folder / "scored"), "set": settings(workspace, *scored)})
    launch(workspace, folder, "sp2_cpu", runs, processes=4)
    for kind in KINDS:
        assert_same_run(of_two_groups / kind, folder / kind, FILES[kind], groups=2)
    assert_close_steps(steps(folder / "resumed"), steps(folder / "lora")[4:])
    assert_same_scores(workspace.folder / "unshared" / "lora" / "index.arrow", folder / "index.arrow")


@pytest.mark.slow
def test_under_zero3(workspace, unshared):
    pytest.importorskip("deepspeed")
    folder = workspace.folder / "sp-zero3"
    folder.mkdir()
    ds_config = json.loads(find_resource("DeepSpeed config", "zero3").read_text())
    (folder / "ds.json").write_text(json.dumps(ds_config))
    runs = runs_of(workspace, folder, KINDS)
    runs.append({**runs[1], "output": str(folder / "resumed"), "resume": f"{folder}/full/checkpoint-4"})
    alone = workspace.folder / "unshared-nf4"  # packed weights have an index of their own
    packed = settings(workspace, "model.quantization=nf4", f"scoring.index={alone}/index.arrow")
    train_several(str(workspace.training), [{"output": str(alone / "nf4"), "set": packed}])
    runs.append({"output": str(folder / "nf4"), "set": packed})
    launch(
        workspace, folder, "sp_zero3", runs, processes=2, use_cpu=True,
        parallelism_config={"parallelism_config_sp_size": 2},
        deepspeed_config={"deepspeed_config_file": str(folder / "ds.json"), "zero3_init_flag": True},
    )  # fmt: skip
    for kind in KINDS:
        assert_same_run(unshared / kind, folder / kind, FILES[kind])
    assert_same_run(alone / "nf4", folder / "nf4", FILES["lora"])
    assert_close_steps(steps(folder / "resumed"), steps(folder / "full")[4:])


def test_a_rank_that_dies_ends_the_others(workspace, unshared):
    output = workspace.folder / "dies"
    arguments = [f"output_dir={output}", *settings(workspace), "training.num_train_epochs=2000"]
    command = workspace.launch_command(
        "train", "--preset", workspace.training, *(word for one in arguments for word in ("--set", one)), processes=2
    )
    command[command.index("accelerate_configs/ddp_cpu.yaml")] = "accelerate_configs/sp2_cpu.yaml"
    process = workspace.start(command, "dies")
    wait_until(lambda: (output / "metrics.jsonl").exists() and len(metrics(output)) > 3, process)
    ranks = {worker.environ()["RANK"]: worker for worker in workers(process) if "RANK" in worker.environ()}
    ranks["1"].send_signal(signal.SIGKILL)
    result = workspace.finish(process, "dies")
    assert result.status not in (0, "none: it ran past its time"), result
    assert not any(worker.is_running() for worker in ranks.values())
    assert not (output / "summary.json").exists()
