"""The benchmarks measure what they say: the baseline is exact, the counters give known answers, every method runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from closeness import assert_close
from numerics.dense_reference import dense_loss
from tiny_models import tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import last_layer, seek, step
from benchmarks.algorithm1 import algorithm1_loss
from benchmarks.memory import LiveStorages, SavedActivations, storage_bytes
from benchmarks.methods import DEFAULT_METHODS, Method, build, make_batch, make_ragged_batch
from benchmarks.shapes import make_model
from benchmarks.step import ROOT, measure, table

OPTIONS = dict(shape="tiny", batch=2, dtype="fp32", device="cpu", steps=1)
KIB = 1024


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_algorithm1_equals_the_dense_reference(kind, ratio):
    model = tiny_model(kind, dtype=torch.float64)
    batch = make_batch(ratio, 2, 13, 97, "cpu")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :3] = -100
    losses = {f: f(model, **batch) for f in (dense_loss, algorithm1_loss)}
    assert_close(losses[algorithm1_loss], losses[dense_loss])
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected, actual = (
        dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)) for loss in losses.values()
    )
    assert_close(actual, expected)


def test_counters_on_a_graph_made_by_hand():
    linear = nn.Linear(256, 256, bias=False)  # 256 KiB
    x = torch.zeros(4, 256)  # 4 KiB, as is everything computed from it
    with LiveStorages().ignore([linear.weight]) as live:
        with SavedActivations(linear) as saved:
            hidden = linear(x)
            loss = (hidden.view(2, 2, 256).exp() * 2).sum()  # exp saves its output; `hidden` lives by its name alone
        # x and exp(hidden) are saved, the weight is not counted; alive: hidden, exp(hidden), loss.
        assert saved.bytes == 8 * KIB
        assert live.bytes == 8 * KIB + 4
        del hidden
        assert live.bytes == 4 * KIB + 4
        loss.backward()
        assert live.bytes == 256 * KIB + 4  # the gradient of the weight
        linear.weight.grad = None
    assert live.bytes == 4
    assert live.peak >= 256 * KIB + 4 * KIB


def test_counters_see_what_checkpointing_keeps():
    linear = nn.Linear(256, 256, bias=False)
    x = torch.zeros(4, 256, requires_grad=True)
    with LiveStorages().ignore([linear.weight]) as live, SavedActivations(linear) as saved:
        hidden = checkpoint(lambda x: linear(x).exp().exp(), x * 2, use_reentrant=False)
    # Alive: the output and, for the second run, the input.
    assert saved.bytes == 4 * KIB
    assert live.bytes == 8 * KIB
    del hidden
    assert live.bytes == 0


def test_storages_count_once_and_ignored_ones_never():
    x = torch.zeros(256)
    assert storage_bytes([x, x.view(2, 128), x[:3], torch.zeros(256)]) == 2 * KIB
    with LiveStorages().ignore([x]) as live:
        x.add_(1)
        x[:5].mul_(2)
    assert live.bytes == live.peak == 0


@pytest.mark.parametrize("method", [m for m in DEFAULT_METHODS.split(",") if "qlora" not in m])
def test_every_method_runs(method):
    result = measure(method, 32, **OPTIONS)
    assert len(result["seconds"]) == 1
    assert 0 < result["saved"] and result["stored"] < result["peak"] and result["states"] > 0


@pytest.mark.parametrize("method", [m for m in DEFAULT_METHODS.split(",") if "qlora" in m])
def test_every_four_bit_method_runs(method):
    pytest.importorskip("bitsandbytes")
    frozen = sum(p.nbytes for p in make_model("tiny").parameters())
    assert 0 < measure(method, 32, **OPTIONS)["states"] < frozen


def test_unequal_examples_are_padded_or_packed():
    """Packing saves what padding costs: 64 + 3 x 8 tokens instead of 4 x 64."""
    methods = ("full", "full+checkpoint+chunked-ce", "tokenseek@0.5", "tokenseek@0.5+packed")
    saved = [measure(method, "64+8+8+8", **OPTIONS)["saved"] for method in methods]
    assert 0 < saved[3] < 0.6 * saved[2]
    losses = []
    for method in methods[2:]:
        model, loss_of = build(method, "tiny", torch.float64, "cpu")
        losses.append(loss_of(**make_ragged_batch(Method.parse(method), [64, 8, 8, 8], 256, "cpu")))
    assert_close(*losses)


def test_selecting_stores_less():
    options = OPTIONS | dict(shape="tiny:num_hidden_layers=8")
    results = {
        m: measure(m, 256, **options) for m in ("full", "full+checkpoint", "tokenseek@0.1", "tokenseek@0.1+recompute")
    }
    saved = {name: result["saved"] for name, result in results.items()}
    assert saved["tokenseek@0.1"] < 0.25 * saved["full"]
    assert saved["tokenseek@0.1+recompute"] < saved["tokenseek@0.1"]


def test_selecting_in_the_step_stores_what_selecting_before_does():
    options = OPTIONS | dict(shape="tiny:num_hidden_layers=8")
    stored = {m: measure(m, 256, **options)["stored"] for m in ("tokenseek@0.1", "online@0.1+error")}
    assert 0.9 * stored["tokenseek@0.1"] < stored["online@0.1+error"] < 1.05 * stored["tokenseek@0.1"]


@pytest.mark.parametrize("name", ["tokenseek", "full@0.1", "full+recompute", "half", "tokenseek@0.1+checkpoint"])
def test_unknown_methods_are_named(name):
    with pytest.raises(SystemExit, match="is not one of"):
        Method.parse(name)


def test_repeats_take_turns_and_failures_are_reported(monkeypatch):
    calls = []

    def run(arguments):
        calls.append((arguments["method"], arguments["memory"]))
        if arguments["method"] == "full+qlora":
            return {"error": "ModuleNotFoundError: No module named 'bitsandbytes'"}
        sizes = dict(saved=8, stored=8, peak=20, states=10) if arguments["memory"] else {}
        return dict(seconds=[{"full": 4.0, "tokenseek@0.5": 1.0}[arguments["method"]]] * 2) | sizes

    monkeypatch.setattr(step, "_in_own_process", run)
    rows = step.run_all(["full", "full+qlora", "tokenseek@0.5"], [16], 2, threads=1)
    assert calls == [
        ("full", True), ("full+qlora", True), ("tokenseek@0.5", True), ("full", False), ("tokenseek@0.5", False),
    ]  # fmt: skip
    assert [len(row["seconds"]) for row in rows] == [4, 0, 4]
    assert [row.get("step_s_to_full") for row in rows] == [1.0, None, 0.25]
    assert "bitsandbytes" in table(rows)


def test_command_line(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.step", "--shape", "tiny", "--methods", "tokenseek@0.5"]
    command += ["--lengths", "16", "--repeats", "1", "--steps", "2", "--threads", "1", "--json", str(out)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows[0]["seconds"]) == 2
    assert process.stdout.rstrip().endswith(table(rows))


def test_scoring_is_measured():
    row = seek.measure(16, shape="tiny", batch=1, dtype="fp32", device="cpu", repeats=1)
    assert 0 < row["score_peak"] < row["full_saved"] * 10 and row["tokens_per_s"] > 0
    assert seek.table([row]).splitlines()[-1].startswith("| 16 | ")


def test_the_last_layer_over_few_tokens_takes_less_arithmetic():
    batch = make_batch(0.1, 1, 64, 256, "cpu", supervised=0.3)
    del batch["selected_positions"]
    ordinary, *rows = last_layer.compare(make_model("tiny").train(), batch, 0.1, rounds=1)
    assert ordinary.arithmetic == ordinary.time == 1
    for over_all, over_few in zip(rows[::2], rows[1::2], strict=True):
        assert over_all.scored_by == over_few.scored_by and over_few.seconds > 0
        assert over_few.arithmetic < over_all.arithmetic < 1
