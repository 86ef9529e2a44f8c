"""`tokenseek reproduce --here`: which runs there are, whether claims held in given rows, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model

from tokenseek.cli import main
from tokenseek.config import load_config
from tokenseek.config.resources import list_resources
from tokenseek.data.translation import DOMAINS, make_sentences
from tokenseek.errors import UserError
from tokenseek.sweeps.paper import NOT_HERE, load_table
from tokenseek.sweeps.reproduce_claims import CLAIMS, HELD, NOT_HELD, NOT_RUN, PARTLY, Measured
from tokenseek.sweeps.reproduce_here import (
    HereOptions,
    here_config,
    here_trials,
    plan_memory_of_paper,
    run_here,
    tables_here,
)
from tokenseek.sweeps.reproduce_page import as_html, as_markdown, page_blocks, page_of_file
from tokenseek.sweeps.sweep import Sweep, read_rows

ROOT = Path(__file__).resolve().parents[2]
JUDGE = {claim.title: claim.judge for claim in CLAIMS}


@pytest.fixture
def config(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model("llama_tied", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    quiet = ["training.report_to=[]", "training.extra={disable_tqdm: true}"]
    return load_config("here", [f"model.name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path / 'run'}", *quiet])


def test_what_is_run(config):
    assert set(tables_here()) | set(NOT_HERE) == set(list_resources("table"))
    trials = here_trials(config, 3, tables_here())
    assert trials[0].name == "1-qlora-seed-0" and len({trial.name for trial in trials}) == len(trials)
    for table in tables_here():
        names = {row.name for row in load_table(table).rows}
        assert {t.labels["row"] for t in trials if t.labels["table"] == table} == names
    stable = [t.name for t in trials[:12] if t.labels["row"] in ("qlora-random", "qlora-tokenseek")]
    assert {f"1-{row}-seed-{seed}" for row in ("qlora-random", "qlora-tokenseek") for seed in range(3)} == set(stable)
    assert all(t.settings["model.quantization"] is None for t in trials)
    rates = {t.settings.get("training.learning_rate") for t in trials if t.settings["peft"] is None}
    assert rates == {config.training.learning_rate / 10}


def test_data_of_this_machine(config, tmp_path):
    problems = [{"question": f"q{n}" + "x" * (300 if n % 2 else 10), "answer": "#### 1"} for n in range(8)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"gsm8k_{split}.jsonl", problems)
    base, told = here_config(config, HereOptions([tmp_path], limit=3, hold_out=2))
    assert "GSM8K's problems of at most 250 characters" in told
    written = [json.loads(line) for line in Path(base.data.sources[0].path).read_text().splitlines()]
    assert written == [problems[0], problems[2], problems[4]]
    with pytest.raises(UserError, match="has 4 short problems; give --limit or --hold-out up to that"):
        here_config(config, HereOptions([tmp_path], limit=5))
    _, told = here_config(config, HereOptions([], limit=5, hold_out=2))
    assert told == "made-up word problems"


def test_a_run_goes_on_and_ends_in_a_page(config, tmp_path, caplog):
    caplog.set_level("INFO", "tokenseek.sweeps")

    def finished():
        return [each for each in caplog.records if each.name == "tokenseek.sweeps.sweep" and "left)" in each.message]

    options = HereOptions(limit=8, hold_out=2, seeds=1, steps=2, tables=["S11"])
    file = run_here(config, options)
    assert len(finished()) == 3
    caplog.clear()
    assert run_here(config, options) == file and not finished()
    rows = read_rows(file)
    assert [row["row"] for row in rows] == ["random", "top", "bands"]
    assert all(len(row["losses"]) == 2 and row["examples"] == 8 and row["average_memory_bytes"] for row in rows)
    page, html = page_of_file(file, tmp_path / "page")
    text = page.read_text()
    assert "8 examples (made-up word problems), 2 optimizer steps, 2 held out" in text
    assert "| Misjudged tokens cost little |" in text and "Not run: all rows." in text
    assert "Training seconds" not in text
    assert "<h1>The paper, and what was measured on this machine</h1>" in html.read_text()


def test_more_texts_and_sentences_are_made_up(config, tmp_path):
    pytest.importorskip("lm_eval")
    file = run_here(config, HereOptions(limit=8, hold_out=4, seeds=1, steps=2, tables=["S6", "S7"]))
    rows = {row["row"]: row for row in read_rows(file)}
    more = rows["qlora-tokenseek-more"]  # of 100,000 texts beside 21,221 examples as many as belong to 8
    assert (more["examples"], rows["qlora"]["examples"]) == (8 + 38, 8)
    assert more["data"] == "made-up word problems and made-up texts"
    assert more["held_out"] == rows["lora"]["held_out"] == 4 and rows["lora"]["examples"] == 8
    assert all(0 <= rows[name]["scores"]["BLEU"] <= 100 for name in ("untrained", "lora", "lora-tokenseek"))
    assert "scores" not in more and rows["untrained"]["loss_after"] == rows["untrained"]["loss_before"]
    page, _ = page_of_file(file, tmp_path / "page")
    assert "| Better translations |" in page.read_text() and "| LoRA with TokenSeek | 41.63 |" in page.read_text()


def test_more_texts_than_can_be_made_up_are_refused(config):
    with pytest.raises(UserError, match="--limit 1062: Table S6 adds 5004 texts .* give --limit 1061 at most, or name"):
        here_config(config, HereOptions(limit=1062, tables=["S6"]))
    here_config(config, HereOptions(limit=1062, tables=["1"]))


def test_rows_that_are_the_same_run_in_several_tables_are_run_once(config):
    sweep = Sweep(Path(config.output_dir), config, here_trials(config, 1, ["1", "S4", "S10"]))
    keys = {(one.labels["table"], one.labels["row"]): sweep.key(one) for one in sweep.trials}
    assert all(key == keys["1", row] for (_, row), key in keys.items())


def row(table, name, loss, seed=0, **values):
    sizes = {"average_memory_bytes": 2**30, "step_peak_bytes": 2**31, "losses": [[1, loss]]}
    return {"table": table, "row": name, "seed": seed, "loss_before": 2.0, "loss_after": loss, **sizes, **values}


ALL, FULL = row("1", "qlora", 1.0), row("1", "full", 1.0)


@pytest.mark.parametrize(
    "title, rows, held",
    [
        ("On par at 10 %", [ALL, FULL, row("1", "qlora-tokenseek", 1.04), row("1", "full-tokenseek", 0.9)], HELD),
        ("On par at 10 %", [ALL, FULL, row("1", "qlora-tokenseek", 1.06), row("1", "full-tokenseek", 1.0)], PARTLY),
        ("On par at 10 %", [ALL, row("1", "qlora-tokenseek", 1.5)], NOT_HELD),
        ("On par at 10 %", [ALL], NOT_RUN),
        (
            "More stable than random",
            [row("1", name, loss, seed)
             for name, losses in (("qlora-random", (1.5, 1.2)), ("qlora-tokenseek", (1.1, 1.0)))
             for seed, loss in enumerate(losses)],
            HELD,
        ),
        ("More stable than random", [row("1", "qlora-random", 1.5), row("1", "qlora-tokenseek", 1.1)], NOT_RUN),
        ("TokenSeek favours PEFT",
         [ALL, FULL, row("1", "qlora-tokenseek", 1.2), row("1", "full-tokenseek", 1.3)], HELD),
        ("TokenSeek favours PEFT",
         [ALL, FULL, row("1", "qlora-tokenseek", 1.2), row("1", "full-tokenseek", 1.22)], PARTLY),
        ("TokenSeek favours PEFT",
         [ALL, FULL, row("1", "qlora-tokenseek", 1.4), row("1", "full-tokenseek", 1.3)], NOT_HELD),
        ("Layers N-1 to N-3 alike",
         [ALL, row("1", "qlora-tokenseek", 1.2), row("S14", "layer-2", 1.22), row("S14", "layer-3", 1.24)], HELD),
        ("Layers N-1 to N-3 alike",
         [ALL, row("1", "qlora-tokenseek", 1.2), row("S14", "layer-2", 1.22), row("S14", "layer-3", 1.26)], NOT_HELD),
        ("Low sensitivity to alpha and beta", [ALL, row("1", "qlora-tokenseek", 1.2)], NOT_RUN),
        ("Misjudged tokens cost little",
         [row("S11", "random", 1.3), row("S11", "top", 1.1), row("S11", "bands", 1.2)], HELD),
        ("Misjudged tokens cost little",
         [row("S11", "random", 1.0), row("S11", "top", 1.1), row("S11", "bands", 1.2)], PARTLY),
        ("r from a budget",
         [row("2", "r-50", 1, average_memory_bytes=5, step_peak_bytes=5), row("2", "r-10", 1, average_memory_bytes=4,
          step_peak_bytes=4)], HELD),
        ("r from a budget", [row("2", "r-50", 1), row("2", "r-10", 1, average_memory_bytes=2**31)], PARTLY),
        ("Scoring takes 13 %", [FULL, row("S12", "scoring", 1, scoring_average_memory_bytes=2**27)], HELD),
        ("Scoring takes 13 %", [FULL, row("S12", "scoring", 1, scoring_average_memory_bytes=2**28)], NOT_HELD),
        *[("More data helps",
           [row("S6", "qlora", 1.0), row("S6", "qlora-tokenseek", 1.2), row("S6", "qlora-tokenseek-more", loss)], held)
          for loss, held in ((1.1, HELD), (1.17, PARTLY), (1.3, NOT_HELD))],
        *[("Better translations",
           [row("S7", name, 1, scores={"BLEU": bleu})
            for name, bleu in (("untrained", 5), ("lora", 40), ("lora-tokenseek", ours))],
           held)
          for ours, held in ((40, HELD), (30, PARTLY), (6, NOT_HELD))],
        ("Better translations", [row("S7", "lora", 1, scores={"BLEU": 40})], NOT_RUN),
        ("More tokens, lower training loss", [row("2", "r-10", 1.2), row("2", "r-50", 1.1)], HELD),
    ],
)  # fmt: skip
def test_claims_are_judged(title, rows, held):
    verdict = JUDGE[title](Measured(rows))
    assert verdict.held == held, verdict.measured


def test_rows_of_evidence_count_for_the_claims_that_they_answer():
    evidence = [
        {"regime": "short-4", "method": method, "ratio": ratio, "seed": seed, "loss_before": 2.0, "loss_after": loss}
        for method, ratio, losses in (
            ("ordinary", None, (1.0, 1.0)), ("paper", 0.1, (1.6, 1.5)), ("paper", 0.3, (9.0,)),
            ("random", 0.1, (1.4, 1.1)),
        )
        for seed, loss in enumerate(losses)
    ]  # fmt: skip
    measured = Measured.of_rows(evidence)
    verdict = JUDGE["On par at 10 %"](measured)
    assert verdict.held == NOT_HELD and "1.550 (1.500 to 1.600) against 1.000 (1.000 to 1.000), 45%" in verdict.measured
    verdict = JUDGE["More stable than random"](measured)
    assert verdict.held == PARTLY and "spreads of 0.100 and 0.300" in verdict.measured


def test_memory_is_planned_once(tmp_path, monkeypatch):
    planned = []

    def plan(config, method, *, tokens):
        planned.append((config.model.quantization, method.ratio, tokens))
        return SimpleNamespace(average=1, peak=2)

    monkeypatch.setattr("tokenseek.sweeps.reproduce_here.plan_memory", plan)
    tables = [("1", "llama-3.2-1b"), ("2", "llama-3.2-1b")]
    rows = plan_memory_of_paper(tmp_path / "plans.jsonl", tables)
    assert len(rows) == len(planned) == 2 * (6 + 4)  # three methods with all tokens and 10 %, four more ratios
    assert ("nf4", 0.1, 2048) in planned and (None, None, 512) in planned
    assert plan_memory_of_paper(tmp_path / "plans.jsonl", tables) == rows and len(planned) == 20


def test_planned_memory_is_judged_by_the_paper_s_shares():
    def plans(average, peak):
        sizes = {"full": (100, 100), "qlora-tokenseek": (average, peak)}
        return [
            {"model": "llama-3.2-1b", "row": name, "lengths": lengths, "tokens": 1, "average": size[0], "peak": size[1]}
            for name, size in sizes.items()
            for lengths in ("average_tokens", "peak_tokens")
        ]

    verdict = JUDGE["Memory at 10 %"](Measured([], plans(15, 14)))
    assert verdict.held == HELD and "15.0 and 14.0 % (14.8 and 14.3 %)" in verdict.measured
    assert JUDGE["Memory at 10 %"](Measured([], plans(15, 20))).held == NOT_HELD
    assert JUDGE["Memory at 10 %"](Measured([])).held == NOT_RUN


@pytest.mark.parametrize("domain", DOMAINS)
def test_sentences_are_made_up_for_each_domain(domain):
    pairs = make_sentences(domain, 2000)
    assert len(dict(pairs)) == 2000 and pairs[:50] == make_sentences(domain, 50)
    assert pairs[:50] != make_sentences(domain, 50, seed=1)
    assert all(text[0].isupper() and text.endswith(".") and "  " not in text for pair in pairs for text in pair)
    with pytest.raises(UserError, match="n is 2001; accepted is 0 to 2000"):
        make_sentences(domain, 2001)


def test_the_page_shows_the_committed_rows():
    measured = Measured.of_rows(read_rows(ROOT / "benchmarks/results/here.jsonl"))
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    for claim in CLAIMS:
        verdict = claim.judge(measured)
        assert f"| {claim.title} | {claim.says} | {verdict.measured} | {verdict.held} |" in page


def test_html_takes_nothing_for_markup():
    blocks = page_blocks(Measured([row("S11", "top", 1.0, error="<b>no memory</b>", settings={})]))
    assert "<b>" not in as_html(blocks) and "&lt;b&gt;no memory" in as_html(blocks)
    assert "| Top 20 % |" in as_markdown(blocks, ROOT)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give a table, or --here for all"),
        (["1", "--here"], "give --tables 1"),
        (["1", "--no-run"], "--no-run goes with --here"),
        (["--here", "--tables", "S3"], "--here does not run it, as it needs hours of training"),
        (["--here", "--rows", "full"], "go with a table"),
        (["--here", "--measured", "none.jsonl"], "there is no such file"),
        (["--here", "--data", "nowhere"], "there is no such folder"),
        (["--here", "--set", "model.name_or_path=nowhere"], "python launch/quickstart.py prepare quickstart"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(["reproduce", *words]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_bleu_needs_the_harness(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["reproduce", "--here", "--tables", "S7"]) == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert "table S7 is judged by BLEU; name other tables with --tables" in told and "tokenseek[eval]" in told
    assert main(["reproduce", "--here", "--tables", "S14", "--set", "model.name_or_path=nowhere"]) == 2
    assert "judged by BLEU" not in capsys.readouterr().err


def test_here_lists_its_runs(capsys):
    assert main(["reproduce", "--here", "--tables", "S14", "--seeds", "1", "--list"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "S14-layer-2-seed-0", "S14-layer-3-seed-0", "S14-random-seed-0", "S14-layer-1-seed-0",
    ]  # fmt: skip
