"""The page, the maps and the figures: equal to what training selects and seeking scores, and safe with any text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from closeness import assert_close
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model

from tokenseek.cli import main
from tokenseek.errors import UserError
from tokenseek.reporting import ShownExample, render_page, shown_example, token_maps
from tokenseek.seeking import TokenScorer
from tokenseek.selection import SelectionRule, combine_scores, select_positions

PAGE = Path(__file__).resolve().parents[2] / "tokenseek/reporting/page"
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "<!--",
    "&lt;b&gt;",
    "\u2028",
    "@SELECT@",
    "@DATA@",
    "a\nb",
    "\ud83d",
    "\x1b[31m",
]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


def example(tokens=None, count: int = 12, seed: int = 0, row: int = 0) -> ShownExample:
    generator = np.random.default_rng(seed)
    tokens = tokens or [f"token{t} " for t in range(count)]
    context, gradient = generator.random((2, len(tokens))).astype(np.float32)
    return ShownExample(row, f"{row:08d}-x", tokens, context, gradient, generator.random(len(tokens)) < 0.6)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.seen = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_page_is_self_contained_and_takes_no_text_for_markup():
    page = render_page([example(HOSTILE)], SelectionRule("top", ratio=0.5), subtitle=HOSTILE[0])
    harmless = render_page([example(["a"] * len(HOSTILE))], SelectionRule("top", ratio=0.5))
    # The same elements whatever the text is, none of which fetches anything.
    assert Tags(page).seen == Tags(harmless).seen
    addresses = {given.get(name) for _, given in Tags(page).seen for name in ("src", "href")}
    assert addresses == {None, "data:,"}
    assert data_of(page)["examples"][0]["tokens"] == HOSTILE
    assert data_of(page)["subtitle"] == HOSTILE[0]
    assert "http" not in re.sub(r"http-equiv", "", page)
    page.encode("utf-8")


def test_scores_survive_to_the_last_bit():
    shown = example(count=50)
    values = data_of(render_page([shown], SelectionRule("top")))["examples"][0]
    assert np.array_equal(np.array(values["context"], np.float32), shown.context)
    assert np.array_equal(np.array(values["gradient"], np.float64), shown.gradient.astype(np.float64))


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's selection, and is not here")
def test_the_page_selects_what_training_selects(tmp_path):
    generator = np.random.default_rng(0)
    cases, expected = [], []
    for number in range(300):
        count = int(generator.integers(1, 80))
        context, gradient = generator.random((2, count)).astype(np.float32)
        if number % 3 == 0:  # ties, and a gradient that is the same everywhere
            context, gradient = np.round(context, 1), np.round(gradient * (number % 2), 1)
        supervised = generator.random(count) < generator.choice([0, 0.3, 1])
        alpha, beta = [(1, 0), (0, 1), (5, 5), (7, 3), (0.3, 9.9)][number % 5]
        ratio, scope = float(generator.choice([0.01, 0.1, 0.125, 0.5, 1])), ["all", "supervised"][number % 2]
        rule = SelectionRule(
            "top", ratio=ratio, alpha=alpha, beta=beta, scope=scope, log_offset=[1e-6, 0.0][number % 4 == 0]
        )
        options = dict(ratio=ratio, alpha=alpha, beta=beta, logOffset=rule.log_offset, scope=scope)
        cases.append([context.astype(float).tolist(), gradient.astype(float).tolist(), supervised.tolist(), options])
        scores = combine_scores(context, gradient, alpha, beta, rule.log_offset)
        expected.append((scores, select_positions(rule, context, gradient, row=0, supervised=supervised)))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = f"""
        const {{selectTop}} = require({json.dumps(str(PAGE / "select.js"))});
        const cases = JSON.parse(require("fs").readFileSync({json.dumps(str(tmp_path / "cases.json"))}));
        console.log(JSON.stringify(cases.map((given) => selectTop(...given))));
    """
    run = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60, check=True)
    for (scores, selected), found in zip(expected, json.loads(run.stdout), strict=True):
        assert found["selected"] == selected.tolist()
        there = np.array([-np.inf if value is None else value for value in found["scores"]])  # JSON has no infinity
        assert (np.isneginf(there) == np.isneginf(scores)).all()
        assert_close(there[np.isfinite(there)], scores[np.isfinite(scores)])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    """Runs the page, moves its sliders, and looks whether hostile text ran."""
    shown = example(HOSTILE * 3, seed=3)
    rule = SelectionRule("top", ratio=0.2, alpha=2, beta=5)
    driver = """<script>addEventListener("load", () => {
      const marked = () => [...document.querySelectorAll("#examples .token.selected")];
      const selected = () => marked().map((s) => Number(s.dataset.position));
      const texts = [...document.querySelectorAll("#examples .token")].map((s) => s.textContent);
      const before = selected();
      for (const [name, value] of [["ratio", 0.5], ["alpha", 0], ["beta", 1], ["scope", "supervised"]]) {
        document.getElementById(name).value = value;
        document.getElementById(name).dispatchEvent(new Event("input"));
      }
      document.querySelector("#examples .token").dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
      const result = { before, after: selected(), texts, hacked: window.hacked ?? null, tip: tip.innerText,
        shaded: document.querySelectorAll("#examples .token[style*=background]").length };
      document.body.replaceChildren(document.createElement("pre"));
      document.querySelector("pre").textContent = JSON.stringify(result);
    });</script></html>"""
    path = tmp_path / "page.html"
    path.write_text(render_page([shown], rule).replace("</html>", driver), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path}",
    ]
    command = [CHROMIUM, *flags, "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    class Text(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag, attributes):
            self.inside = tag == "pre"

        def handle_data(self, data):
            self.text += data if self.inside else ""

        def handle_endtag(self, tag):
            self.inside = False

    parser = Text()
    parser.feed(dom)
    result = json.loads(parser.text)
    options = dict(row=0, supervised=shown.supervised)
    assert result["before"] == select_positions(rule, shown.context, shown.gradient, **options).tolist()
    changed = SelectionRule("top", ratio=0.5, alpha=0, beta=1, scope="supervised")
    assert result["after"] == select_positions(changed, shown.context, shown.gradient, **options).tolist()
    assert result["hacked"] is None
    assert result["texts"][:2] == HOSTILE[:2]
    assert result["shaded"] > 10
    assert "position 0" in result["tip"] and "rank" in result["tip"]


def prompt_and_response():
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 90, 20)
    return ids.tolist(), np.where(np.arange(20) < 8, -100, ids).tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_maps_add_up_to_the_scores_of_seeking(kind):
    import torch

    ids, labels = prompt_and_response()
    model = tiny_model(kind, attn="eager")
    maps = token_maps(model, ids, labels)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_close(maps.attention.sum(1), np.ones(len(ids)), torch.float32)
    batch = torch.tensor([ids]), torch.ones(1, len(ids)), torch.tensor([labels])
    for k in (1, 2, 3):
        context, gradient = TokenScorer(tiny_model(kind), gradient_layer=k).score(*batch)
        assert_close(maps.by_layer[k - 1], gradient[0])
    assert_close(maps.context, context[0])
    assert_close(maps.gradient.sum(1), maps.by_layer[0])


def test_maps_that_cannot_be_had_are_refused():
    ids, labels = prompt_and_response()
    with pytest.raises(UserError, match="eager"):
        token_maps(tiny_model("llama"), ids, labels)
    with pytest.raises(UserError, match="no token with a loss"):
        token_maps(tiny_model("llama", attn="eager"), ids, [-100] * len(ids))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Arguments of a run over four examples, scored."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": "Add 1 and 2.", "response": text} for text in (*HOSTILE[:2], "three", "1 + 2 = 3")]
    settings = {
        "model.name_or_path": folder / "model",
        "model.dtype": "float32",
        "data.sources.0.path": write_jsonl(folder / "data.jsonl", rows),
        "output_dir": folder,
    }
    from tokenseek.config import load_config
    from tokenseek.runs.score import score

    arguments = [f"{key}={value}" for key, value in settings.items()]
    score(load_config(None, arguments))
    return ["show", *(f"--set={argument}" for argument in arguments)]


def test_show_writes_a_page(run, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main([*run, "--row", "1", "--random", "2", "--html", str(path)]) == 0
    shown = data_of(path.read_text(encoding="utf-8"))["examples"]
    assert len(shown) == 3 and shown[0]["row"] == 1
    assert HOSTILE[1] in "".join(shown[0]["tokens"])
    assert main([*run, "--row", "4"]) == 2
    assert "rows 0 to 3" in capsys.readouterr().err


def test_show_prints_without_an_option(run, capsys):
    assert main([*run, "--no-color"]) == 0
    assert "[[" in capsys.readouterr().out


def test_a_runs_folder_is_shown(run, tmp_path, capsys):
    from tokenseek.config import load_config, save_resolved

    config = load_config(None, [word.removeprefix("--set=") for word in run[1:]])
    save_resolved(config, tmp_path / "config.yaml")
    assert main(["show", str(tmp_path), "--no-color", "--row", "2"]) == 0
    assert "row 2, " in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--preset", "gsm8k"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "other")]) == 2
    assert f"there is no folder {tmp_path / 'other'}" in capsys.readouterr().err
    assert main(["show", str(tmp_path.parent)]) == 2
    assert f"{tmp_path.parent} is no run: it has no config.yaml" in capsys.readouterr().err


def test_a_run_that_selects_online_is_told_how_to_make_its_index(run, tmp_path, capsys):
    from tokenseek.config import load_config, save_resolved

    settings = [word.removeprefix("--set=") for word in run[1:]]
    online = ["scoring.mode=online", "scoring.reduction=l2", f"output_dir={tmp_path}"]
    save_resolved(load_config(None, [*settings, *online]), tmp_path / "config.yaml")
    assert main(["show", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"there is no index {tmp_path / 'index.arrow'}: the run selects its tokens in each training step" in told
    (words,) = [line.split() for line in told.splitlines() if line.startswith("  tokenseek score")]
    assert words == ["tokenseek", "score", "--preset", str(tmp_path / "config.yaml")]
    from tokenseek.runs.score import score

    score(load_config(words[3]))
    assert main(["show", str(tmp_path), "--no-color"]) == 0
    assert "[[" in capsys.readouterr().out


def test_show_writes_figures(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([*run, "--row", "2", "--random", "1", "--figures", str(tmp_path)]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        f"{name}.{kind}" for name in ("case-row-2", "layers-row-2", "examples") for kind in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def write_run(folder: Path, ratio: float, seed: int, rule: str = "top") -> Path:
    folder.mkdir(parents=True)
    selection = {"rule": rule, "ratio": ratio, "alpha": 5.0, "beta": 5.0}
    config = {
        "selection": selection,
        "training": {"ditching": True},
        "peft": {"method": "lora"},
        "model": {"quantization": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": step, "loss": 2 - ratio - step / 10 + seed / 100, "peak_memory_bytes": 2**28 * (1 + ratio)}
        for step in range(5)
    ]
    lines += [{"step": 5, "held_out_loss": 1.5 - ratio + seed / 100, "peak_memory_bytes": 2**28}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    return folder


def test_figures_of_runs(tmp_path):
    pytest.importorskip("matplotlib")
    from tokenseek.reporting.figures import RunMetrics, figure_ratio

    runs = [
        write_run(tmp_path / f"{rule}-{ratio}-{seed}", ratio, seed, rule)
        for rule in ("top", "random")
        for ratio in (0.1, 0.5)
        for seed in (0, 1)
    ]
    given = [f"--run={folder}" for folder in runs]
    assert main(["show", *given, "--figures", str(tmp_path / "figures")]) == 0
    assert len(list((tmp_path / "figures").iterdir())) == 6
    (axes,) = figure_ratio([RunMetrics(folder) for folder in runs]).axes
    assert [line.get_label() for line in axes.lines] == ["top \u03b1=5 \u03b2=5, lora", "random, lora"]
    assert_close(axes.lines[0].get_xydata(), np.array([[10, 1.405], [50, 1.005]]))
    assert main(["show", f"--run={tmp_path}", "--figures", str(tmp_path)]) == 2
    assert main(["show", *given]) == 2


def test_shown_example_keeps_the_alignment():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("1 + 2")["input_ids"]
    shown = shown_example(tokenizer, 0, {"example_id": "a", "input_ids": ids, "labels": ids}, (np.ones(len(ids)),) * 2)
    assert len(shown.tokens) == len(ids) and "".join(shown.tokens) == "1 + 2"
    assert shown.supervised.tolist() == [True] * (len(ids) - 1) + [False]
