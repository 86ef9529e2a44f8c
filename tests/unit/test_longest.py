"""The longest example that fits, per method: `tokenseek plan --longest`."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoConfig

import benchmarks.plan
from benchmarks.plan import LORA, model_config
from tokenseek.cli import main
from tokenseek.errors import UserError
from tokenseek.planning import GPUS, Lengths, Method, longest_by_method, plan_memory, proposals
from tokenseek.planning.longest import TOLERANCE

LLAMA = model_config("llama", hidden=64, layers=2, vocab=500, tokens=96)
LEARNED = AutoConfig.for_model("gpt2", vocab_size=500, n_embd=64, n_layer=2, n_head=4, n_positions=128)
CONFIG = benchmarks.plan.run_config(96, *LORA)


@pytest.mark.slow
def test_the_longest_example_fits_and_a_longer_one_does_not():
    method = Method(0.1, recompute=True)
    lengths = Lengths(CONFIG, method, model_config=LLAMA)
    budget = plan_memory(CONFIG, method, tokens=9000, model_config=LLAMA).peak
    found = lengths.longest(budget)
    # Not 9,000 itself: the rows of a tile, and with them what it holds, go up and down with the length.
    assert found.peak <= budget and found.tokens[1] > 9000 * (1 - 2 * TOLERANCE)
    assert lengths.plan(found.tokens[1] * 5 // 4).peak > budget
    # On a line between lengths that are known, it is found without a plan, and not too long.
    known = len(lengths.known)
    tokens = lengths.longest_on_lines(budget)
    assert len(lengths.known) == known and abs(tokens - found.tokens[1]) < 4 * TOLERANCE * found.tokens[1]


def test_where_the_shortest_does_not_fit_there_is_none():
    lengths = Lengths(CONFIG, Method(), model_config=LLAMA)
    states = lengths.plan(2048).states
    assert lengths.longest(states + 1) is None


def test_learned_positions_end_it():
    assert Lengths(CONFIG, Method(), model_config=LEARNED).longest(2**34).tokens == (1, 128)


def test_a_budget_below_the_weights_is_told():
    with pytest.raises(UserError, match=r"0.0 MiB is below what weights, .* take before the first token"):
        Lengths(CONFIG, Method(), model_config=LLAMA).longest(1024)


@pytest.fixture
def command(tmp_path):
    LLAMA.save_pretrained(tmp_path / "model")
    settings = [f"model.name_or_path={tmp_path}/model", "data.sources.0.path=none", "output_dir=none", *LORA]
    return ["plan", "--longest", "--processes", "1", *(word for setting in settings for word in ("--set", setting))]


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "--longest needs a size of memory: --budget 23GiB, or --gpu RTX4090"),
        (["--budget", "1GiB", "--tokens", "5"], "--longest finds a length and --tokens 5 gives one"),
        (["--budget", "1GiB", "--set", "training.packing=true"], "training.packing=True.*training.packing=false"),
        (["--budget", "1GiB,7 elephants"], "7 elephants"),
        (["--budget", "10KiB"], "is below what weights"),
        (
            ["--budget", "1GiB", "--plot", "picture.jpeg"],
            "picture.jpeg: a picture.s name ends with .png",
        ),
    ],
)
def test_bad_input(command, more, message, capsys):
    assert main([*command, *more]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors


def test_the_command_prints_a_line_for_each_method(command, tmp_path, capsys):
    file = tmp_path / "plans.json"
    picture = tmp_path / "lengths.png"
    command = [*command, "--set", "selection.rule=top"]  # of so few layers an exact one is a large part
    assert main([*command, "--budget", "8MiB,24MiB", "--json", str(file), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("all tokens", "TokenSeek"))]
    assert len(lines) == 6 and "8.0 MiB" in printed and "24.0 MiB" in printed
    assert "would need rotary scaling" in printed  # more than its 96 positions
    longest = {json.dumps(plan["method"]): plan["tokens"][1] for plan in json.loads(file.read_text())}
    assert picture.read_bytes().startswith(b"\x89PNG")
    ordinary, *_, on_host = longest.values()
    assert on_host > 2 * ordinary


@pytest.mark.slow  # a gain in time alone
def test_processes_side_by_side_find_what_one_does():
    methods = Method(0.1), Method(0.5, recompute=True)
    one, two = (
        longest_by_method(CONFIG, methods, [2**23, 2**34], model_config=LEARNED, processes=processes)
        for processes in (1, 2)
    )
    assert one == two and [each.method for each in one] == list(methods)
    assert all(each.tokens[1] == 128 for each in one)


def test_a_gpu_stands_for_its_memory():
    assert all(2**34 < gpu.memory < 2**38 for gpu in GPUS.values())


@pytest.mark.slow
def test_proposals_fit_and_the_fastest_is_first():
    config = benchmarks.plan.run_config(512, *LORA, "training.gradient_accumulation_steps=4")
    gpu = GPUS["A100-40"]

    def peak(batch: int, recompute: bool) -> int:
        changed = config.training.model_copy(update={"per_device_train_batch_size": batch})
        shaped = config.model_copy(update={"training": changed})
        return plan_memory(shaped, Method(0.5, recompute, "device"), model_config=LLAMA).peak

    assert peak(2, False) < peak(4, False)
    options = dict(ratios=[0.1, 0.5], model_config=LLAMA)
    found = proposals(config, peak(2, False), gpu, **options)
    assert [plan.method.ratio for plan in found] == [0.1, 0.5]  # fewer tokens are faster
    assert found[1].tokens == (2, 512) and found[1].micro_batches == 2 and not found[1].method.recompute
    assert all(plan.peak <= peak(2, False) for plan in found)
    smaller = proposals(config, peak(1, False) - 1, gpu, **options)
    assert smaller[-1].method == Method(0.5, True, "device")
    assert proposals(config, 1024, gpu, **options) == []
