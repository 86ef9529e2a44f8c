"""The page of `tokenseek reproduce --here` in Markdown and HTML: claims, tables and figures of rows that were run."""

from __future__ import annotations

import html
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenseek.sweeps.paper import NOT_HERE, load_table
from tokenseek.sweeps.reproduce import FIGURES, cells
from tokenseek.sweeps.reproduce_claims import CLAIMS, Measured, planned_share
from tokenseek.sweeps.reproduce_here import tables_here
from tokenseek.sweeps.sweep import Row, read_rows
from tokenseek.sweeps.tables import markdown


@dataclass(frozen=True)
class Heading:
    """A title of the page; those of level 2 are its parts."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` and [links](to) are marked as in Markdown."""

    text: str


@dataclass(frozen=True)
class Table:
    """Attributes:
    words: whether its cells are words, and not numbers, which stand on the right.
    """

    titles: Sequence[str]
    lines: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure, without the suffix of its files."""

    title: str
    path: Path


Block = Heading | Text | Table | Picture


def page_blocks(measured: Measured, figures: Sequence[Path] = ()) -> list[Block]:
    """The page, with figures that are drawn already."""
    rows, plans = measured.rows, measured.plans
    blocks: list[Block] = [
        Heading("The paper, and what was measured on this machine", 1),
        Text(
            "Every table and figure of the paper on SmolLM2-135M-Instruct in float32, made by "
            "`tokenseek reproduce --here` ([how](tuning.md)). The paper's models have 0.5 to 7 billion parameters, "
            "train on 21,221 examples and are judged by benchmarks; here the loss on held-out answers decides, in nats "
            "per token, so that lower is better. A claim that fails here has failed at this size, with this data."
        ),
        Text(_size(rows)),
        Heading("Claims"),
        Table(
            ["claim", "the paper says", "measured here", "held?"],
            [[claim.title, claim.says, *claim.judge(measured)] for claim in CLAIMS],
            words=True,
        ),
        Text(
            "Two losses count as alike when they differ by less than 5 % of what training on all tokens gains. All "
            "adapters have one learning rate here, as in the paper; [Evidence](evidence.md) compares methods at their "
            "own best rates, and rules that teach more than the paper's."
        ),
    ]
    for name in tables_here():
        table = load_table(name)
        own = [row for row in rows if row["table"] == name]
        missing = [row.label for row in table.rows if not any(row.name == found["row"] for found in own)]
        blocks.append(Heading(f"{_name(name)}: {table.title}"))
        if own:
            titles, lines = cells(table, table.rows, own, table.paper, brief=True)
            models = table.paper[0] + (f", else {' or '.join(table.paper[1:])}" if table.paper[1:] else "")
            blocks += [Text(f"Figures of the paper: {models}."), Table(titles, lines)]
        if missing:
            blocks.append(Text("Not run: " + ("all rows." if not own else "; ".join(missing) + ".")))
        blocks += [Picture(table.title, path) for path in figures if path.name == f"paper-{name.lower()}"]
    if plans:
        blocks += _planned(plans)
    blocks.append(Heading("Not run here"))
    left_out = [[_name(name), reason] for name, reason in NOT_HERE.items()]
    left_out.append(["HumanEval of Table S10", "leave to run the model's programs: `tokenseek reproduce S10`"])
    blocks.append(Table(["table", "needs"], left_out, words=True))
    return blocks


def _size(rows: Sequence[Row]) -> str:
    if not rows:
        return "Nothing has been run yet."
    sizes = {(row["examples"], row["steps"], row["held_out"], row["data"]) for row in rows if "error" not in row}
    told = [
        f"{examples} examples ({data}), {steps} optimizer step{'s' * (steps > 1)}, {held_out} held out"
        for examples, steps, held_out, data in sorted(sizes)
    ]
    seeds = len({row["seed"] for row in rows})
    runs = len({(str(row["settings"]), row["seed"]) for row in rows})
    return (
        f"Size: {'; '.join(told)}. {runs} runs, up to {seeds} seed{'s' * (seeds > 1)} a row. QLoRA is LoRA on float32 "
        "weights here. Memory is what is allocated in traced steps, relative to full tuning; times are left out, since "
        "the machine was not idle."
    )


def _planned(plans: Sequence[Row]) -> list[Block]:
    rows = {row.name: row for table in ("2", "1") for row in load_table(table).rows}
    lengths = {row["lengths"]: row["tokens"] for row in plans}
    lines = []
    for model in dict.fromkeys(row["model"] for row in plans):
        for name in dict.fromkeys(row["row"] for row in plans if row["model"] == model):
            shares = [planned_share(plans, model, name, column) for column in ("average_tokens", "peak_tokens")]
            figures = rows[name].paper.get(model, [None, None])[-2:]
            told = ["" if share is None else f"{share:.1f}" for share in (figures[0], shares[0], figures[1], shares[1])]
            lines.append([model, rows[name].label, *told])
    text = (
        "`tokenseek plan` runs a step of the paper's own models on tensors without data. The paper does not tell how "
        f"long its texts are: averages are those of {lengths.get('average_tokens')} tokens, peaks those of "
        f"{lengths.get('peak_tokens')}."
    )
    titles = ["model", "setting", "ave. mem. % (paper)", "planned", "max. mem. % (paper)", "planned"]
    return [Heading("Memory of Tables 1 and 2 at the paper's sizes, planned"), Text(text), Table(titles, lines)]


def _name(table: str) -> str:
    return f"Figure {table[3:]}" if table in FIGURES else f"Table {table}"


def as_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """For a page in `folder`."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Table):
            text = markdown(block.titles, block.lines)
            parts.append(text.replace(" ---: |", " --- |") if block.words else text)
        else:
            parts.append(f"![{block.title}]({block.path.relative_to(folder).as_posix()}.png)")
    return "\n\n".join(parts) + "\n"


def as_html(blocks: Sequence[Block]) -> str:
    """In one file: pictures are part of it."""
    body = []
    for block in blocks:
        if isinstance(block, Heading):
            body.append(f"<h{block.level}>{_inline(block.text)}</h{block.level}>")
        elif isinstance(block, Text):
            body.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Table):
            head = "".join(f"<th>{_inline(title)}</th>" for title in block.titles)
            lines = ["".join(f"<td>{_inline(cell)}</td>" for cell in line) for line in block.lines]
            kind = "words" if block.words else "numbers"
            body.append(f"<table class={kind}><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")
        else:
            svg = block.path.with_suffix(".svg").read_text(encoding="utf-8")
            body.append(f"<figure>{svg[svg.index('<svg') :]}<figcaption>{_inline(block.title)}</figcaption></figure>")
    return _FRAME.format(
        title=html.escape(blocks[0].text if isinstance(blocks[0], Heading) else ""), body="\n".join(body)
    )


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


def page_of_file(file: Path, folder: Path) -> list[Path]:
    """:func:`write_page` of a ``here.jsonl``."""
    return write_page(Measured.of_rows(read_rows(file)), folder)


def write_page(measured: Measured, folder: Path) -> list[Path]:
    """Write ``paper.md``, ``paper.html`` and their figures; without matplotlib, without figures."""
    figures = []
    if importlib.util.find_spec("matplotlib"):
        from tokenseek.sweeps.reproduce_figures import draw_table

        for name in FIGURES:
            own = [row for row in measured.rows if row["table"] == name]
            if path := draw_table(load_table(name), own, folder / "figures" / f"paper-{name.lower()}"):
                figures.append(path)
    blocks = page_blocks(measured, figures)
    written = [folder / "paper.md", folder / "paper.html"]
    folder.mkdir(parents=True, exist_ok=True)
    written[0].write_text(as_markdown(blocks, folder), encoding="utf-8")
    written[1].write_text(as_html(blocks), encoding="utf-8")
    return written


_FRAME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #d8dee6; padding: .35rem .6rem; text-align: left; vertical-align: top; }}
.numbers td + td, .numbers th + th {{ text-align: right; }}
th {{ background: #f3f6f9; }}
code {{ background: #f3f6f9; padding: 0 .2em; }}
figure {{ margin: 1rem 0; }}
svg {{ max-width: 100%; height: auto; }}
figcaption {{ color: #5b6776; font-size: 14px; }}
</style>
{body}
</html>
"""
