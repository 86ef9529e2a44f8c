"""benchmarks/gpu.sh in rehearsal, where nothing but torch, Transformers, accelerate, pytest and PEFT is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_steps
from benchmarks.gpu import PARTS, Setting, run_part
from benchmarks.gpu_report import gpu_of, planned, read_rows, report
from benchmarks.gpu_steps import step_rows
from tokenseek.planning import GPUS

ROOT = Path(__file__).resolve().parents[2]
# A plan takes a second: one shape's rows say what the others would.
_OTHER_STEPS = [name for name in PARTS if name.startswith("steps") and name != "steps-1x2048"]
# What Python's own search finds is left out of it, as if it were not installed.
HIDDEN = """
from importlib.machinery import PathFinder
import sys

HIDDEN = {"bitsandbytes", "datasets", "deepspeed", "liger_kernel", "lm_eval", "matplotlib", "pandas", "pyarrow"}
HIDDEN |= {"pydantic", "trl"}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment of Python processes in which other packages are not installed."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(HIDDEN, encoding="utf-8")
    return os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def rehearsed(bare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", str(folder)]
    process = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process, folder


def test_every_part_is_rehearsed(rehearsed):
    process, folder = rehearsed
    rows = read_rows(folder)
    assert [json.loads(line) for line in process.stdout.splitlines()] == rows
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(PARTS)
    assert not [row for row in rows if "error" in row]


def test_steps_are_measured_with_old_and_new_batches(rehearsed):
    rows = [row for row in read_rows(rehearsed[1]) if row["part"] == "steps-8x2048"]
    assert [(row["method"], row["lengths"]) for row in rows] == [(m, n) for m in gpu.METHODS for n in ("same", "new")]
    for row in rows:
        assert row["ms"] >= row["host_ms"] > 0 and row["launches"] > 0 and row["peak"] > 0 and row["tokens_per_s"] > 0
        assert all(map(gpu_steps.math.isfinite, row["losses"]))


def test_what_is_not_installed_is_left_out_by_name(rehearsed):
    rows = [row for row in read_rows(rehearsed[1]) if row["part"] == "qlora-8b"]
    assert {row["skipped"] for row in rows} == {"bitsandbytes is not installed"} and len(rows) == len(gpu.QLORA)
    rows = [row for row in read_rows(rehearsed[1]) if row["part"] == "few-launches"]
    assert [row["skipped"] for row in rows[::2]] == [
        "is not rehearsed: it is for GPUs",
        "liger_kernel is not installed",
    ]


def test_nor_is_peft_needed(bare, tmp_path):
    """Every package that the script needs is imported by the first part; adapters are left out by name."""
    hidden = HIDDEN.replace('"pydantic"', '"pydantic", "peft"')
    (tmp_path / "sitecustomize.py").write_text(hidden, encoding="utf-8")
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", str(tmp_path), "kernels", "steps-1x2048"]
    command += ["scoring", "tests", "lora-8b"]
    environment = bare | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    rows = [row for row in read_rows(tmp_path) if row["part"] == "lora-8b"]
    assert [row["skipped"] for row in rows] == ["peft is not installed"] * len(gpu.LORA)


@pytest.mark.parametrize("absent", ["bitsandbytes", "peft"])
def test_four_bits_with_adapters_need_both_packages(monkeypatch, absent):
    monkeypatch.setattr(gpu_steps, "find_spec", lambda name: None if name == absent else object())
    assert gpu_steps.missing_package("tokenseek@0.1+qlora") == absent


def test_the_report_has_every_row_and_its_plan(rehearsed):
    rows = [row for row in read_rows(rehearsed[1]) if row["part"] not in ("lora-8b", *_OTHER_STEPS)]
    text = report(rows)
    lines = [line for line in text.splitlines() if line.startswith("| tiny | 1 x 32 | tokenseek@0.1 | same")]
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    measured, foretold = float(cells[10]), float(cells[12])
    assert foretold == pytest.approx(measured, rel=0.1)
    assert int(cells[14]) > 0
    assert "qlora-8b, full+qlora: bitsandbytes is not installed" in text
    assert "nothing here says anything about a GPU" in text
    assert f"Parts that have no row: {', '.join(_OTHER_STEPS[:-1])}, lora-8b, {_OTHER_STEPS[-1]}." in text
    assert "skipped" in text.partition("#### Tests")[2]


def test_faults_and_parts_without_rows_are_told(rehearsed):
    rows = [row for row in read_rows(rehearsed[1]) if row["part"] in ("kernels", "attention")]
    failed = dict(
        part="steps-1x2048", device="NVIDIA H100 80GB HBM3", rehearsal=False, shape="tiny", batch=1, tokens=32
    )
    text = report([*rows, failed | dict(dtype="bf16", method="full", error="out of memory")])
    assert "- steps-1x2048, full: out of memory" in text
    assert "Parts that have no row: steps-8x2048, " in text


def test_a_line_that_was_cut_short_is_left_out(rehearsed, tmp_path, capsys):
    line = (rehearsed[1] / "kernels.jsonl").read_text().splitlines()[0]
    (tmp_path / "kernels.jsonl").write_text(line + "\n" + line[:20])
    assert read_rows(tmp_path) == [json.loads(line)]
    assert "kernels.jsonl: left out an unfinished line" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no rows of benchmarks/gpu.sh"):
        read_rows(tmp_path / "nowhere")


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    build = gpu_steps.build

    def poisoned(*args):
        model, loss_of = build(*args)
        return model, lambda **batch: loss_of(**batch) * torch.tensor(float("nan"))

    monkeypatch.setattr(gpu_steps, "build", poisoned)
    rows = list(step_rows(["full"], "tiny", 1, 32, "cpu", "fp32", steps=1, seconds=0))
    assert [row["error"] for row in rows] == ["ArithmeticError: the loss of step 1 with same batches is nan"]
    monkeypatch.setitem(PARTS, "kernels", gpu.Part(1, lambda setting: iter(rows)))
    assert not run_part("kernels", Setting("cpu", "fp32", True), tmp_path)


def test_a_part_that_is_ended_keeps_its_rows(tmp_path, monkeypatch):
    def rows(setting):
        yield dict(check="one")
        assert json.loads((tmp_path / "kernels.jsonl").read_text())["check"] == "one"

    monkeypatch.setitem(PARTS, "kernels", gpu.Part(1, rows))
    assert run_part("kernels", Setting("cpu", "fp32", True), tmp_path)


def test_names_and_limits(bare, tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    listed = subprocess.run([*command, "--list"], env=bare, capture_output=True, text=True, timeout=60)
    limits = dict(line.split() for line in listed.stdout.splitlines())
    assert list(limits) == list(PARTS) and max(map(int, limits.values())) <= 150
    unknown = subprocess.run([*command, tmp_path, "steps"], env=bare, capture_output=True, text=True, timeout=60)
    assert unknown.returncode == 1 and "no part is named steps; there are: kernels steps-1x2048" in unknown.stderr


def test_batches_of_a_method():
    trained = gpu_steps.Trained("tokenseek@0.1", "tiny", "cpu", "fp32")
    same = [trained._batch(2, 64, False, step) for step in (0, 1)]
    new = [trained._batch(2, 64, True, step) for step in (0, 1)]
    for name in ("input_ids", "selected_positions"):
        assert torch.equal(same[0][name], same[1][name]) and not torch.equal(new[0][name][:, :4], new[1][name][:, :4])
    assert same[0]["input_ids"].shape == (2, 64) and "attention_mask" not in same[0]
    assert all(48 <= int(row) <= 64 for batch in new for row in batch["labels"].ne(-100).sum(1))
    for batch in (*same, *new):
        given = {name: batch[name] for name in batch if name != "planned_rows"}
        torch.testing.assert_close(trained.loss_of(**batch), trained.loss_of(**given))


@pytest.mark.parametrize(
    "device,name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("x86_64 CPU", None),
    ],
)
def test_the_planners_gpu_of_a_device(device, name):
    assert gpu_of(device) == GPUS.get(name)


def test_plans_are_of_the_rows_own_method():
    row = dict(shape="tiny", batch=1, tokens=64, dtype="bf16", device="NVIDIA H100 80GB HBM3")
    plans = {m: planned(row | dict(method=m)) for m in ("full", "full+qlora", "online@0.5", "tokenseek@0.5+recompute")}
    assert str(plans["tokenseek@0.5+recompute"].method) == "TokenSeek r = 0.5, recomputed"
    assert plans["full+qlora"].states < plans["full"].states
    assert plans["online@0.5"].work.operations.total() > plans["tokenseek@0.5+recompute"].work.operations.total()
    assert planned(row | dict(method="full+checkpoint+chunked-ce")) is None


def test_a_training_step_needs_no_library_of_data(bare):
    """With the packages of a GPU machine alone: import, switch token ditching on, take steps of both engines."""
    code = """
import torch, tokenseek
from benchmarks.shapes import make_model
from tokenseek.selection import SelectionRule
from tokenseek.seeking import TokenScorer
model = tokenseek.enable_token_ditching(make_model("tiny"))
ids = torch.arange(16)[None]
model(input_ids=ids, labels=ids, selected_positions=torch.tensor([[3, 9]])).loss.backward()
rule = tokenseek.SelectionRule("sampled", 0.5, alpha=0, beta=1, explore=0.3, scope="supervised")
model(input_ids=ids, labels=ids, selection=rule, selection_keys=torch.tensor([1])).loss.backward()
TokenScorer(model).score(ids, torch.ones_like(ids), ids)
"""
    environment = bare | {"PYTHONPATH": f"{bare['PYTHONPATH']}:{ROOT}"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
