"""The paper's tables: their files, what a row changes, and the table that is made of its rows."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_preset import tiny_preset

from tokenseek.config import override_config, save_resolved
from tokenseek.config.resources import list_resources
from tokenseek.errors import UserError
from tokenseek.sweeps.paper import PaperTable, TableRow, load_table, row_settings, table_config
from tokenseek.sweeps.reproduce import render, reproduce
from tokenseek.sweeps.sweep import Sweep, Trial, read_rows

TABLES = [
    "1", "2", "Fig3", "Fig5", "Fig6", "S10", "S11", "S12", "S13", "S14", "S3", "S4", "S5", "S6", "S7", "S8", "S9",
]  # fmt: skip


def test_every_table_of_the_paper_is_there():
    assert list_resources("table") == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_a_run_of_every_model_of_its_table(name, tmp_path):
    table = load_table(name)
    for paper in table.paper:
        config = table_config(table, None, paper=paper, limit=None if name == "S7" else 500)
        trials = [Trial(row.name, row_settings(row, config)) for row in table.rows]
        configs = [Sweep(tmp_path, config, [trial]).config(trial) for trial in trials]
        # These compare methods, data or costs, not selections.
        same_selection = ("S3", "S6", "S7", "S8", "S9", "S12")
        assert len({run.selection.model_dump_json() for run in configs if run.peft}) > 1 or name in same_selection
        for row, run in zip(table.rows, configs, strict=True):
            assert (run.model.quantization, run.peft and run.peft.method) == {
                "full": (None, None), "qlora": ("nf4", "lora"), "bone": (None, "miss"),
            }.get(row.method, (None, row.method))  # fmt: skip
            assert run.training.ditching != (row.settings.get("training.ditching") is False)


def test_figures_of_the_paper():
    rows = {row.name: row for row in load_table("1").rows}
    *scores, average, _, peak = rows["qlora-tokenseek"].paper["llama-3.2-1b"]
    assert sum(scores) / 5 == pytest.approx(average, abs=0.006) and peak == 14.3
    # Every average of the paper is that of its five scores, but for a slip of its own.
    slips = []
    for name in ("1", "2", "S4", "S9", "S10", "S11", "S14"):
        table = load_table(name)
        scores = table.columns.index("Average")
        for row in table.rows:
            for model, figures in row.paper.items():
                if abs(sum(figures[:scores]) / scores - figures[scores]) > 0.011:
                    slips.append((name, row.name, model))
    assert slips == SLIPS


SLIPS = []


def test_the_limit_keeps_the_proportion_of_extra_data(tmp_path):
    table = load_table("S6")
    config = table_config(table, None, limit=200)
    settings = row_settings(table.rows[-1], config, extra_data=tmp_path / "texts.jsonl")
    assert config.data.sources[0].rows == 200
    assert settings["data.sources.1"] == {
        "name": None, "path": str(tmp_path / "texts.jsonl"), "kind": "text", "rows": round(200 * 100_000 / 21_221),
    }  # fmt: skip


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(paper="gpt-5"), "--paper gpt-5: the table has figures of qwen2.5-0.5b, llama-3.2-1b"),
        (dict(rows="ful"), "there is no row 'ful'.*full.*accepted are full, full-random"),
        (dict(table="7"), "unknown table '7'"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        table = load_table(change.get("table", "1"))
        table.choose(change.get("rows"))
        table_config(table, None, paper=change.get("paper"))


def test_a_file_with_a_wrong_number_of_figures_is_refused(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(
        "title: x\npaper: [a]\ncolumns: [A, B]\nrows: [{name: r, label: r, method: full, paper: {a: [1]}}]\n"
    )
    with pytest.raises(UserError, match="row r: a has 1 figures, not 2"):
        load_table(str(path))


def translation_script():
    path = Path(__file__).resolve().parents[2] / "launch" / "translation.py"
    spec = importlib.util.spec_from_file_location("translation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_translation_needs_its_task_and_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = translation_script()
    table = load_table("S7")
    config = table_config(table, None)
    with pytest.raises(UserError, match="the table shows BLEU: give --tasks translation and --data FOLDER"):
        table.require_measurable(table.rows, config, 1, None)
    with pytest.raises(UserError, match="there is no multi-domain/medical.jsonl, .*launch/translation.py"):
        table.require_measurable(table.rows, config, 1, "translation")
    for domain in script.DOMAINS:
        (tmp_path / domain).mkdir()
        for split in ("train", "test"):
            (tmp_path / domain / f"{split}.de").write_text("eins\nzwei\n")
            (tmp_path / domain / f"{split}.en").write_text("one\ntwo\n")
    script.convert(tmp_path, tmp_path / "multi-domain", tests=1)
    table.require_measurable(table.rows, config, 1, "translation")
    first = json.loads((tmp_path / "multi-domain" / "it.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "German phrase: eins\nEnglish phrase:", "completion": " one"}
    tests = [json.loads(line) for line in (tmp_path / "multi-domain" / "translation.jsonl").read_text().splitlines()]
    assert len(tests) == 4 and tests[0]["source_language"] == "German"
    (tmp_path / "law" / "train.en").write_text("one\n")
    with pytest.raises(SystemExit, match="train.de has 2 lines, train.en 1"):
        script.convert(tmp_path, tmp_path / "multi-domain", tests=1)


@pytest.mark.parametrize("name", ["Fig3", "Fig5", "Fig6"])
def test_figures_are_drawn_of_rows(name, tmp_path):
    pytest.importorskip("matplotlib")
    from tokenseek.sweeps.reproduce_figures import draw_table

    table = load_table(name)
    rows = [
        {"row": row.name, "seed": seed, "settings": row.settings, "loss_after": 1 - seed / 10,
         "losses": [[1, 2.0], [2, 1.0]], "average_memory_bytes": 2**28, "step_peak_bytes": 2**29}
        for row in table.rows for seed in (0, 1)
    ]  # fmt: skip
    assert draw_table(table, rows, tmp_path / "figure") == tmp_path / "figure"
    assert (tmp_path / "figure.png").stat().st_size > 5000 and "<svg" in (tmp_path / "figure.svg").read_text()
    assert draw_table(table, [{**rows[0], "error": "no memory"}], tmp_path / "none") is None


ROWS = [
    TableRow(name="full", label="Full", method="full", paper={"m": [50.0, 100]}),
    TableRow(name="ours", label="Ours", method="lora", paper={"m": [51.5, 20]}),
]
TABLE = PaperTable(title="t", paper=["m"], columns=["Average", "Max. mem. %"], rows=ROWS)


def result(row, seed, average, peak):
    return {
        "row": row, "seed": seed, "scores": {"ARC": 30.0, "Average": average}, "peak_memory_bytes": 2**33,
        "step_peak_bytes": peak, "average_memory_bytes": peak // 2 if row == "full" else peak, "loss_after": None,
        "seconds": 60.0, "supervised_share": 0.5,
    }  # fmt: skip


def test_measured_stands_beside_the_papers():
    results = [result("full", 0, 40.0, 2**32), result("ours", 0, 41.0, 2**30), result("ours", 1, 42.0, 2**30)]
    lines = render(TABLE, ROWS, results, "m").splitlines()
    assert lines[0] == "Figures of the paper: m. Mean (least to greatest) over seeds."
    assert lines[2] == (
        "| setting | Average (paper) | Average | Max. mem. % (paper) | Max. mem. % | ARC "
        "| Ave. mem. % | Selected with a loss | Average memory | Peak memory | Training seconds |"
    )
    assert lines[4] == "| Full | 50 | 40.00 | 100 | 100.0 | 30.00 | 100.0 | 50% | 2.00 GiB | 4.00 GiB | 60.0 |"
    assert lines[5] == (
        "| Ours | 51.5 | 41.50 (41.00 to 42.00) | 20 | 25.0 | 30.00 (30.00 to 30.00) | 50.0 | 50% | 1.00 GiB "
        "| 1.00 GiB | 60.0 |"
    )


def test_variance_and_errors():
    table = TABLE.model_copy(update={"shows": "variance", "columns": ["Variance"]})
    rows = [row.model_copy(update={"paper": {"m": [0.1]}}) for row in ROWS]
    results = [result("ours", 0, 41.0, 1), result("ours", 1, 42.0, 1), {"row": "full", "seed": 0, "error": "no memory"}]
    lines = render(table, rows, results, "m").splitlines()
    assert "| Ours | 0.1 | 0.50000 |" in lines[5] and "no memory" in lines[4]


def test_scoring_costs_are_measured(tmp_path, capsys):
    config = tiny_preset(tmp_path)
    save_resolved(config, tmp_path / "preset.yaml")
    table = load_table("S12")
    config = table_config(table, str(tmp_path / "preset.yaml"), limit=10)
    full, scoring = table.rows
    rows = [full, scoring.model_copy(update={"method": "lora"})]
    path = reproduce("S12", table, config, rows=rows, steps=1, hold_out=2)
    assert path == tmp_path / "run" / "table-S12" / "table.md"
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("| Scoring")]
    _, _, _, share, _, seconds, *_ = (cell.strip() for cell in line.split("|"))
    assert "| 13.2 |" in line and "| 291 |" in line and 0 < float(share) < 100 and float(seconds) >= 0
    row = next(row for row in read_rows(path.with_name("rows.jsonl")) if row["row"] == "scoring")
    assert 0 < row["scoring_average_memory_bytes"] < row["scoring_peak_memory_bytes"]
    assert "Cost of scoring" in path.read_text()
    with pytest.raises(UserError, match="give --seeds 2"):
        reproduce("S13", load_table("S13"), config, rows=[])
    with pytest.raises(UserError, match="no held-out data in common"):
        reproduce("S6", load_table("S6"), config, rows=load_table("S6").rows)
    with pytest.raises(UserError, match="several sources"):
        sources = [source.model_dump(mode="json") for source in config.data.sources] * 2
        several = override_config(config, {"data.sources": sources})
        save_resolved(several, tmp_path / "several.yaml")
        table_config(table, str(tmp_path / "several.yaml"), limit=10)
