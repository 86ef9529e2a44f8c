"""Training through the launcher: losses do not depend on the number of processes or on interruptions."""

import json
import shutil

import pytest
import torch
from closeness import assert_close
from conftest import assert_close_steps, metrics, steps
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenseek.config import load_config
from tokenseek.config.resources import list_resources
from tokenseek.data import prepare_dataset
from tokenseek.models.loading import load_tokenizer
from tokenseek.planning import Engine, Method, plan_memory
from tokenseek.runs.train import train as run_training
from tokenseek.training import TokenSeekCollator
from tokenseek.training.sampling import EpochSampler


@pytest.fixture(scope="module")
def lora(workspace):
    """The output folder of a run of one process, which scored first, and what it printed."""
    output = workspace.folder / "lora"
    result = workspace.launch("train", "--preset", workspace.training, "--set", f"output_dir={output}", processes=1)
    return output, result


@pytest.fixture(scope="module")
def train(workspace, lora):
    """Launches a training with the index of the first run."""

    def run(name, *settings, processes):
        output = workspace.folder / name
        shared = [f"output_dir={output}", f"scoring.index={lora[0]}/index.arrow", *settings]
        overrides = [word for setting in shared for word in ("--set", setting)]
        result = workspace.launch("train", "--preset", workspace.training, *overrides, processes=processes)
        assert "scoring the data first" not in result.out
        return output

    return run


@pytest.fixture(scope="module")
def lora_of_two(train):
    return train("lora-two", "training.per_device_train_batch_size=1", processes=2)


def assert_same_steps(one, two):
    one, two = steps(one), steps(two)
    assert [step for step, *_ in one] == [step for step, *_ in two] == list(range(1, 13))
    assert_close_steps(two, one)
    assert one[-1][1] < one[0][1]


def test_two_processes_take_the_steps_of_one(workspace, lora, lora_of_two):
    # The data holds what makes this hard: a last batch with room, and processes that have no token with a loss.
    config = load_config(workspace.training)
    dataset = prepare_dataset(config.data, load_tokenizer(config.model)).dataset
    collator = TokenSeekCollator(str(lora[0] / "index.arrow"), rule=config.selection.to_rule())
    assert len(dataset) == 21
    order = list(EpochSampler(21, 1, config.seed))
    has_loss = [bool((collator([dataset[row]])["labels"] != -100).any()) if row < 21 else False for row in order]
    assert 6 < sum(has_loss) < 14
    # Process p takes every second example; a step is two of them on each.
    pairs = [[any(has_loss[4 * step + p : 4 * step + 4 : 2]) for p in (0, 1)] for step in range(6)]
    assert [True, False] in pairs or [False, True] in pairs
    assert_same_steps(lora[0], lora_of_two)


def test_packed_batches_take_the_steps_of_padded_ones(workspace, lora, train, script):
    """On two processes, with blank examples at the end; the same number of tokens is told for both."""
    # Recomputing activations changes no number; PEFT and torch warn of their own code where they are.
    more = ["training.gradient_accumulation_steps=1", "training.recompute=true"]
    two = train("packed-two", "training.packing=true", *more, processes=2)
    told = (workspace.folder / "launch.err").read_text().splitlines()
    assert not [line for line in told if "warn" in line.lower()], "\n".join(told)
    assert_same_steps(lora[0], two)
    output = workspace.folder / "packed"
    settings = [f"output_dir={output}", f"scoring.index={lora[0]}/index.arrow", "training.packing=true"]
    result = script(
        "train", "--preset", workspace.training, *(word for setting in settings for word in ("--set", setting))
    )
    assert result.status == 0, result
    assert_same_steps(lora[0], output)
    padded, packed = (json.loads((run / "summary.json").read_text()) for run in (lora[0], output))
    assert packed["tokens"] == padded["tokens"]
    assert_close(packed["loss_after"], padded["loss_after"], torch.float32)


def test_two_processes_take_the_steps_of_one_in_full_fine_tuning(workspace, lora, train):
    full = ["peft=null", "training.save_strategy='no'", "training.learning_rate=1e-3"]
    one = workspace.folder / "full"
    run_training(load_config(workspace.training, [f"output_dir={one}", f"scoring.index={lora[0]}/index.arrow", *full]))
    two = train("full-two", *full, "training.per_device_train_batch_size=1", processes=2)
    assert_same_steps(one, two)
    weights = [AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (one, two)]
    assert_close(weights[1], weights[0])


def test_a_resumed_run_takes_the_steps_of_the_whole_one(workspace, lora_of_two, train):
    whole, resumed = lora_of_two, workspace.folder / "resumed"
    shutil.copytree(whole / "checkpoint-8", resumed / "checkpoint-8")  # in the middle of the second epoch
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    # The run was killed while it wrote a later checkpoint, and a line.
    (resumed / "checkpoint-12").mkdir()
    shutil.copy(whole / "checkpoint-12" / "adapter_model.safetensors", resumed / "checkpoint-12")
    (resumed / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + '{"step": 12, "lo')
    train("resumed", "training.per_device_train_batch_size=1", processes=2)
    # Gradients are summed over buckets, which a resumed run divides anew: norms differ in their last bit.
    assert_close_steps(steps(resumed), steps(whole))
    before, after = (json.loads((run / "summary.json").read_text()) for run in (whole, resumed))
    assert_close(after["loss_after"], before["loss_after"], torch.float32)
    assert after["loss_before"] is None and after["steps"] == 12


def test_a_run_goes_on_with_another_number_of_processes(workspace, lora, lora_of_two, train, script):
    """The batch of a step is the same; the checkpoint is one of the other number's, in the middle of an epoch."""
    shutil.copytree(lora[0] / "checkpoint-8", workspace.folder / "one-to-two" / "checkpoint-8")
    two = train("one-to-two", "training.per_device_train_batch_size=1", processes=2)
    assert_close_steps(steps(two), steps(lora[0])[8:])

    settings = [f"output_dir={workspace.folder}/two-to-one", f"training.resume={lora_of_two}/checkpoint-8"]
    settings.append(f"scoring.index={lora[0]}/index.arrow")
    arguments = ["--preset", workspace.training, *(word for setting in settings for word in ("--set", setting))]
    one = script("train", *arguments)
    assert one.status == 0 and "WARNING" not in one.out, one
    assert_close_steps(steps(workspace.folder / "two-to-one"), steps(lora_of_two)[8:])
    # With another batch it is another run from there on, and says so.
    other = script("train", *arguments, "--set", "training.gradient_accumulation_steps=1")
    assert "WARNING: an epoch had 6 steps" in other.err and "now it has 11" in other.err, other


def test_a_resumed_run_draws_the_random_selections_of_the_whole_one(workspace, script):
    # This rule needs no index, and none is made.
    settings = ["selection.rule=random", "selection.ratio=0.3", "peft.dropout=0.2"]
    arguments = [word for setting in settings for word in ("--set", setting)]

    def run(output, *more):
        result = script("train", "--preset", workspace.training, *arguments, "--set", f"output_dir={output}", *more)
        assert result.status == 0 and "scoring" not in result.out, result
        assert not (output / "index.arrow").exists()
        return steps(output)

    whole = workspace.folder / "random"
    losses = run(whole)
    assert len(losses) == 12
    resumed = workspace.folder / "random-resumed"
    resume = ["--set", f"training.resume={whole}/checkpoint-8"]
    assert run(resumed, *resume) == losses[8:]
    # A run that is not resumed begins its files anew, in a folder that holds another run's too.
    assert run(whole, "--set", "training.resume=never") == losses


def test_the_share_that_fits_is_trained_with_and_kept_by_a_resumed_run(workspace, script):
    config = load_config(workspace.training, ["selection.rule=random"])
    longest = max(map(len, prepare_dataset(config.data, load_tokenizer(config.model)).dataset["input_ids"]))
    budget = plan_memory(config, Method(0.6), Engine(on_cpu=True), tokens=longest).peak
    output = workspace.folder / "auto"
    settings = ["selection.rule=random", "selection.ratio=auto", f"output_dir={output}", "training.save_steps=2"]

    def run(budget, max_steps):
        own = [*settings, f"training.memory_budget='{budget}'", f"training.max_steps={max_steps}"]
        words = [word for setting in own for word in ("--set", setting)]
        return script("train", "--preset", workspace.training, *words)

    assert "selection.ratio: auto: in 1.0 MiB: nothing fits" in run(2**20, 2).refusal()
    result = run(budget, 2)
    assert result.status == 0 and "selection.ratio: auto: r = 0.6 is the largest share that fits" in result.out, result
    assert load_config(output / "config.yaml").selection.ratio == 0.6
    result = run(2**20, 4)
    assert result.status == 0 and f"r = 0.6 as before in {output}/checkpoint-2" in result.out, result
    assert load_config(output / "config.yaml").selection.ratio == 0.6 and len(steps(output)) == 4


def test_what_a_run_leaves(workspace, lora, console):
    output, result = lora
    assert f"There is no index at {output}/index.arrow: scoring the data first." in result.out
    assert "21 examples prepared" in result.out and "7 examples have no token with a loss" in result.out
    assert load_config(output / "config.yaml") == load_config(workspace.training, [f"output_dir={output}"])
    lines = metrics(output)
    assert lines[0]["step"] == 0 and lines[0]["held_out_loss"] > 0
    assert all(line["peak_memory_bytes"] > 0 and line["seconds"] >= 0 for line in lines)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["loss_after"] < summary["loss_before"] == lines[0]["held_out_loss"]
    assert summary["tokens"] > 0 and summary["tokens_per_second"] > 0 and summary["trainable_parameters"] > 0
    assert list(output.rglob("events.out.tfevents.*"))
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}

    final = {path.name for path in (output / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= final
    assert not [name for name in final if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    card = (output / "final" / "README.md").read_text()
    assert "library_name: peft" in card and "rule `top`, ratio 0.2" in card and "held-out loss after" in card

    # The adapter merged into its base is the model that was trained.
    merged = workspace.folder / "merged"
    assert console("merge-adapter", output / "final", merged).status == 0
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in merged.iterdir()}
    ids = torch.tensor([AutoTokenizer.from_pretrained(merged)("How many apples are left?")["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(workspace.model)
    with torch.no_grad():
        untrained = base(ids).logits
        expected = PeftModel.from_pretrained(base, output / "final")(ids).logits
        got = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert_close(got, expected)
    assert (got - untrained).abs().max() > 1e-2
    assert "is not empty" in console("merge-adapter", output / "final", merged).refusal()
    assert "adapter_config.json" in console("merge-adapter", merged, workspace.folder / "x").refusal()

    config = str(output / "config.yaml")
    shown = console("show", "--preset", config, "--row", "3", "--row", "0", "--no-color")
    assert shown.status == 0 and "21" in shown.out and "row 3" in shown.out, shown
    first, second = shown.out.split("\nrow ")[1:]
    for text in (first, second):
        assert f"{text.count('[[')} selected" in text.splitlines()[0]
    assert "### Response" in second
    assert "rows 0 to 20" in console("show", "--preset", config, "--row", "21").refusal()
    presets = console("presets", "--names")
    assert presets.status == 0 and presets.out.split() == list_resources("preset")
