"""The runs of the evidence and its tables; the page shows the committed rows."""

import dataclasses
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from tiny_preset import tiny_preset

from benchmarks import evidence
from benchmarks.evidence import METHODS, REGIMES, base_config, best_rate, planned, table, trial
from benchmarks.one_budget import select_of_whole_batch
from benchmarks.pages import write_into
from tokenseek.config.loading import override_config
from tokenseek.ditching import online
from tokenseek.runs.summary import TrainingSummary
from tokenseek.selection import SelectionRule
from tokenseek.sweeps import sweep
from tokenseek.sweeps.sweep import Sweep, read_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evidence.md"


def row(method, ratio, rate, seed, loss, regime="short-4"):
    labels = {"regime": regime, "method": method, "ratio": ratio, "rate": rate, "seed": seed}
    return {**labels, "loss_before": 2.0, "loss_after": loss, "steps": 20}


ROWS = [
    row("ordinary", None, 4e-3, 0, 1.0),
    row("ordinary", None, 8e-3, 0, 1.2),
    row("ordinary", None, 4e-3, 1, 1.2),
    row("online", 0.1, 2e-3, 0, 1.3),
    row("online", 0.1, 4e-3, 0, 1.25),
    row("online", 0.1, 4e-3, 1, 1.25),
    row("ordinary", None, 4e-3, 0, 0.5, "long-4"),
]


def test_scan_runs_every_rate_and_confirm_the_best_one_with_all_seeds():
    args = Namespace(regime="short-4", methods=["ordinary", "online"], ratios=[0.1, 0.3], rates=None, seeds=[0, 1, 2])
    args.stage = "scan"
    scanned = planned(args, [])
    assert len(scanned) == len({t.name for t in scanned}) == 3 * len(REGIMES["short-4"].rates)
    assert {t.labels["seed"] for t in scanned} == {0}
    args.regime = "full-8"  # all weights are trained at smaller rates
    assert {t.labels["rate"] for t in planned(args, [])} == set(REGIMES["full-8"].rates)
    args.regime = "short-4"
    args.stage = "confirm"
    confirmed = planned(args, ROWS)
    assert [(t.labels["method"], t.labels["rate"], t.labels["seed"]) for t in confirmed] == [
        *(("ordinary", 4e-3, seed) for seed in (0, 1, 2)),
        *(("online", 4e-3, seed) for seed in (0, 1, 2)),
    ]  # nothing was scanned at 0.3
    assert best_rate(ROWS, "short-4", "online", 0.3) is None
    args.methods = ["checkpointing"]  # its steps are ordinary training's: only what they take is another matter
    assert planned(args, ROWS) == []
    args.stage, args.steps, args.epochs = "longer", 15, "one"
    assert {one.labels["rate"] for one in planned(args, ROWS)} == {4e-3}


def test_a_scan_of_several_seeds_is_refused(monkeypatch, capsys):
    words = ["run", "--model", "m", "--data", "d", "--output", "o", "--stage", "scan", "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["evidence", *words])
    with pytest.raises(SystemExit):
        evidence.main()
    assert "--stage scan takes one of --seeds; --stage confirm takes several" in capsys.readouterr().err


def test_rates_that_have_the_same_seeds_are_compared_by_their_means():
    scanned = [row("online", 0.1, 2e-3, 0, 1.0), row("online", 0.1, 4e-3, 0, 1.1), row("online", 0.1, 8e-3, 0, 1.2)]
    more = [row("online", 0.1, 4e-3, 1, 1.1), row("online", 0.1, 4e-3, 2, 1.1)]
    assert best_rate(scanned + more, "short-4", "online", 0.1) == 2e-3
    more += [row("online", 0.1, 2e-3, 1, 1.2)]
    assert best_rate(scanned + more, "short-4", "online", 0.1) == 2e-3  # 1.1 on the mean of both
    more += [row("online", 0.1, 2e-3, 2, 1.3)]
    assert best_rate(scanned + more, "short-4", "online", 0.1) == 4e-3


def test_runs_with_one_budget_for_a_batch_are_selected_by_it_and_told_apart(tmp_path, monkeypatch):
    """Their settings are those of runs with a budget for each example."""
    ran = []

    def run(config, loss_before):
        ran.append((config.output_dir, online.select_batch is select_of_whole_batch))
        summary = {field.name: None for field in dataclasses.fields(TrainingSummary)}
        return TrainingSummary(**{**summary, "loss_before": 2.0, "loss_after": 1.0})

    monkeypatch.setattr(sweep, "train", run)
    args = Namespace(
        regime="short-4", methods=["exact-1", "exact-1-batch"], ratios=[0.1], stage="confirm", rates=[4e-3]
    )
    args = Namespace(**vars(args), seeds=[0], output=tmp_path / "runs")
    for _ in range(2):  # the second time all are known
        evidence.run_stage(args, tiny_preset(tmp_path))
    trials = tmp_path / "runs" / "trials", tmp_path / "runs" / "of-batch" / "trials"
    names = "exact-1-r0.1-0.004-seed-0", "exact-1-batch-r0.1-0.004-seed-0"
    assert ran == [(str(trials[0] / names[0]), False), (str(trials[1] / names[1]), True)]
    args.rates = None  # the best of both
    evidence.run_stage(args, tiny_preset(tmp_path))
    assert len(ran) == 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_run(tmp_path, method):
    one = trial("short-4", method, 0.1 if METHODS[method].takes_ratio else None, 1e-3, 5)
    config = Sweep(tmp_path, tiny_preset(tmp_path), [one]).config(one)
    assert config.seed == 5 and config.training.learning_rate == 1e-3
    assert config.training.ditching == (method not in ("ordinary", "checkpointing"))


@pytest.mark.parametrize(
    "method, mode, rule, exact",
    [
        ("exact-1", "online", SelectionRule("sampled", 0.1, alpha=0, beta=1, explore=0.3, scope="supervised"), "auto"),
        ("online", "online", SelectionRule("sampled", 0.1, alpha=0, beta=1, explore=0.3, scope="supervised"), 0),
        ("index", "index", SelectionRule("sampled", 0.1, alpha=0, beta=1, explore=0.3, scope="supervised"), 0),
        ("paper", "index", SelectionRule("top", 0.1, alpha=5, beta=5, scope="all"), 0),
        ("random", "index", SelectionRule("random", 0.1, scope="all"), 0),
        ("response", "index", SelectionRule("all", scope="supervised"), 0),
    ],
)
def test_what_methods_select_does_not_change_with_a_default(tmp_path, method, mode, rule, exact):
    """The rows were made with these; the methods leave out what is the package's default today."""
    base = override_config(tiny_preset(tmp_path), {"selection": {}, "peft": None})
    one = trial("short-4", method, 0.1 if METHODS[method].takes_ratio else None, 1e-3, 0)
    config = Sweep(tmp_path, base, [one]).config(one)
    assert config.selection.to_rule() == rule
    assert (config.scoring.mode, config.selection.exact_layers) == (mode, exact)


def test_measured_seconds_are_kept(tmp_path, monkeypatch):
    measured = {"seconds": 8, "step_peak_bytes": 5}
    monkeypatch.setattr(evidence, "base_config", lambda *_, **__: tiny_preset(tmp_path))
    monkeypatch.setattr(
        evidence, "Sweep", lambda *_: Namespace(run=lambda _: [row("ordinary", None, 1e-3, 0, 1.0) | measured])
    )
    args = Namespace(regime="short-4", methods=["ordinary"], ratios=[], output=tmp_path, steps=2, threads=1)
    for repeats, micro_batch in ((1, None), (3, None), (1, 2)):
        args.repeats, args.micro_batch = repeats, micro_batch
        evidence.measure_seconds(args)
    rows = read_rows(tmp_path / "seconds.jsonl")
    assert [(row["repeat"], row.get("micro_batch"), row["seconds_a_step"]) for row in rows] == [
        (0, None, 4), (1, None, 4), (2, None, 4), (0, 2, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("name", REGIMES)
def test_data_of_a_regime(tmp_path, name):
    problem = '{"question": "How many?", "answer": "3"}\n'
    for split in ("train", "test"):
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(problem * 1000)
    args = Namespace(regime=name, output=tmp_path / "out", data=tmp_path, model="model")
    config, regime = base_config(args), REGIMES[name]
    rows = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert len(rows) == (regime.examples * regime.steps if regime.epochs == 1 else 1000)
    assert rows[0].count("How many?") == 1 + regime.solved
    batch = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    assert batch == regime.examples and config.training.max_steps == regime.steps
    assert (config.peft is not None) == regime.adapter


def test_table(tmp_path):
    text = table(ROWS)
    assert [line for line in text.splitlines() if line.startswith("| drawn")] == [
        "| drawn by gradient, online | 0.1 | 0.004 | 1.250 (1.250 to 1.250) | 83.3% (2 seeds) | 0.002: 1.300, "
        "0.004: 1.250 |"
    ]
    assert "| ordinary training |  | 0.004 | 1.100 (1.000 to 1.200) | 100.0% (2 seeds) |" in text
    assert "**five solved problems before each question" not in text  # ordinary training alone
    assert "**five solved problems before each question" in table([*ROWS, row("online", 0.1, 4e-3, 0, 0.6, "long-4")])
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table -->\nold\n<!-- end of table -->\nb\n")
    write_into(page, text)
    assert page.read_text() == f"a\n<!-- table -->\n{text}\n<!-- end of table -->\nb\n"
    page.write_text("a\n")
    with pytest.raises(SystemExit, match="has no lines"):
        write_into(page, text)


def test_longer_runs_see_new_examples_or_the_same_ones_again(tmp_path):
    problem = '{"question": "How many?", "answer": "3"}\n'
    for split in ("train", "test"):
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(problem * 1000)
    args = Namespace(regime="short-4", output=tmp_path / "out", data=tmp_path, model="model", stage="longer")
    args = Namespace(**vars(args), methods=["online"], ratios=[0.1], seeds=[0, 1], steps=35, epochs="one")
    args.rates = None
    usual, more = base_config(args), base_config(args, 35 * 4)
    lengths = [len(Path(config.data.sources[0].path).read_text().splitlines()) for config in (usual, more)]
    assert lengths == [80, 140]
    with pytest.raises(SystemExit, match="1004 examples are asked for; 1000 have at most 250 characters"):
        base_config(args, 251 * 4)
    longer = planned(args, ROWS)
    assert [(one.settings["training.max_steps"], one.labels["rate"], one.labels["epochs"]) for one in longer] == [
        (35, 4e-3, "one"),
        (35, 4e-3, "one"),
    ]
    args.rates = [8e-3]  # what another regime found
    assert [one.labels["rate"] for one in planned(args, [])] == [8e-3, 8e-3]
    assert not {one.name for one in longer} & {trial("short-4", "online", 0.1, 4e-3, seed).name for seed in (0, 1)}


def test_longer_runs_are_judged_by_the_same_problems(tmp_path):
    for split in ("train", "test"):
        problems = [{"question": f"{split} {number}?", "answer": "3"} for number in range(1000)]
        (tmp_path / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    args = Namespace(regime="long-4", output=tmp_path / "out", data=tmp_path, model="model")
    read = lambda name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()  # noqa: E731
    base_config(args)
    usual, deciding = read("train"), read("test")
    base_config(args, 180)
    assert read("train-180")[:80] == usual and len(set(read("train-180"))) == 180
    assert read("test") == deciding
    base_config(args, held_out=1)
    assert read("test-1") == deciding[:1]


def test_table_at_equal_seconds():
    def seconds(method, ratio, *measured, **more):
        labels = {"regime": "short-4", "method": method, "ratio": ratio, "threads": 2, **more}
        return [{**labels, "seconds_a_step": each} for each in measured]

    longer = [
        {**row("online", 0.1, 4e-3, seed, 0.9), "steps": 30, "epochs": epochs}
        for seed in (0, 1)
        for epochs in ("one", "several")
    ]
    longer.append({**row("online", 0.1, 2e-3, 0, 0.8), "steps": 30, "epochs": "one"})
    scored = {**row("index", 0.1, 4e-3, 0, 1.5), "steps": 40, "epochs": "one"}
    measured = [
        *seconds("ordinary", None, 2.5, 3.5),
        *seconds("online", 0.1, 2.0),
        *seconds("index", 0.1, 1.0, scoring_seconds=20.0),
    ]
    text = table([*ROWS, *longer, scored, *measured])
    assert table(ROWS).split("\n\n")[1] in text  # longer runs are in tables of their own
    of_one, of_several = (part for part in text.split("\n\n**") if "at equal seconds" in part)
    assert "each example seen once (2 threads, from 2.000 nats" in of_one
    assert "in several epochs (2 threads, from 2.000 nats" in of_several
    assert "| ordinary training |  | 0.004 | 20 | 60 | 1.100 (1.000 to 1.200) | 100.0% (2 seeds) |" in of_one
    assert "| drawn by gradient, online | 0.1 | 0.004 | 30 | 60 | 0.900 (0.900 to 0.900) | 122.2% (2 seeds) |" in of_one
    assert "| drawn by gradient, online | 0.1 | 0.002 | 30 | 60 | 0.800 | 120.0% (1 seed) |" in of_one
    assert "| drawn by gradient, index | 0.1 | 0.004 | 40 | 60 | 1.500 | 50.0% (1 seed) |" in of_one
    assert "index" not in of_several


def test_the_page_shows_the_committed_rows():
    rows = [row for path in sorted(RESULTS.glob("evidence-*.jsonl")) for row in read_rows(path)]
    assert f"<!-- table -->\n{table(rows)}\n<!-- end of table -->" in PAGE.read_text(encoding="utf-8")


def test_the_readme_has_the_losses_of_the_page():
    """Beside ordinary training, at equal seconds: of the same table, and with three seeds."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    of_readme = text[text.index("| what is trained |") :].split("\n\n")[0].splitlines()[2:]
    tables = [part for part in PAGE.read_text(encoding="utf-8").split("\n**") if "at equal seconds**" in part]
    means = [set(re.findall(r"\| (\d\.\d{3}) \([^|]+\| [\d.]+% \(3 seeds\)", part)) for part in tables]
    ordinary = ""
    for row in of_readme:
        _, beside, ours, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        ordinary = beside or ordinary
        assert any({ordinary, ours.split(": ")[1]} <= of_table for of_table in means), row
    assert len(of_readme) == 8
