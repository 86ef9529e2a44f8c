"""The grid of the evidence and its table; the page shows the committed rows."""

from pathlib import Path

import pytest

from benchmarks.evidence import OPTIONS, RULES, table, trials, write_into
from tokenseek.sweeps.sweep import read_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "evidence.md"


def test_all_rules_come_first_seed_by_seed():
    grid = trials([0.1, 0.5], [0, 1])
    assert len({trial.name for trial in grid}) == len(grid)
    first = [trial.labels for trial in grid[: 2 * len(RULES)]]
    assert [labels["rule"] for labels in first] == [*RULES, *RULES]
    assert [labels["seed"] for labels in first] == [0] * len(RULES) + [1] * len(RULES)
    rest = grid[2 * len(RULES) :]
    assert len(rest) == 2 * (len(RULES) - 1 - len(OPTIONS)) and {trial.labels["ratio"] for trial in rest} == {0.5}
    for trial in grid:
        assert trial.settings["seed"] == trial.settings["selection.seed"] == trial.labels["seed"]
    bands = next(trial for trial in grid if trial.labels["rule"] == "bands")
    assert bands.settings["selection.bands"] == [[0, 0.05], [0.4, 0.45]]


def test_table(tmp_path):
    def row(rule, ratio, loss, steps=20):
        losses = {"loss_before": 2.0, "loss_after": loss}
        return {"rule": rule, "ratio": ratio, "steps": steps, "supervised_share": 0.5, **losses}

    rows = [row("random", 0.1, 1.5), row("full", 1.0, 1.0), row("random", 0.1, 1.7), row("random", 0.1, 1.2, 40)]
    text = table(rows)
    assert "before training: 2.0000" in text
    assert text.splitlines()[-3:] == [
        "| all tokens, no ditching | 100% | 20 | 50% | 1.0000 | 100% | 1 |",
        "| random | 10% | 20 | 50% | 1.6000 (1.5000 to 1.7000) | 40% | 2 |",
        "| random | 10% | 40 | 50% | 1.2000 | 80% | 1 |",
    ]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table -->\nold\n<!-- end of table -->\nb\n")
    write_into(page, text)
    assert page.read_text() == f"a\n<!-- table -->\n{text}\n<!-- end of table -->\nb\n"
    page.write_text("a\n")
    with pytest.raises(SystemExit, match="has no lines"):
        write_into(page, text)


def test_the_page_shows_the_committed_rows():
    rows = [row for name in ("evidence-gsm8k", "evidence-gsm8k-longer") for row in read_rows(RESULTS / f"{name}.jsonl")]
    assert f"<!-- table -->\n{table(rows)}\n<!-- end of table -->" in PAGE.read_text(encoding="utf-8")
