"""`tokenseek show`: an index in the terminal, as a page and as figures."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenseek.config import RunConfig
from tokenseek.data import PreparedData, prepare_dataset
from tokenseek.errors import UserError
from tokenseek.index import TokenIndex
from tokenseek.models.loading import load_model, load_tokenizer
from tokenseek.reporting import describe_index, render_example, render_page, shown_example, token_maps
from tokenseek.runs.inputs import run_fingerprints
from tokenseek.selection import Top
from tokenseek.training import TokenSeekCollator

# More maps than this do not fit on one figure.
_EXAMPLES_IN_A_FIGURE = 6


def show(
    config: RunConfig,
    rows: Sequence[int] = (),
    drawn: int = 0,
    *,
    html: Path | None = None,
    figures: Path | None = None,
    color: bool = False,
) -> Iterator[str]:
    """The index of a run and its examples, as lines; with `html` or `figures` writes those of them instead.

    Args:
        rows: which examples; the first where neither `rows` nor `drawn` is given.
        drawn: add so many examples at random, always the same for a ``selection.seed``.

    Raises:
        UserError: there is no such row, or the index does not belong to the run.
    """
    index = TokenIndex.open(config.index_path)
    rule = config.selection.to_rule()
    collator = TokenSeekCollator(index, rule=rule)
    yield describe_index(index)
    for row in rows:
        if not 0 <= row < len(index):
            raise UserError(f"row {row}: the index has rows 0 to {len(index) - 1}.")
    others = [row for row in range(len(index)) if row not in set(rows)]
    picked = random.Random(rule.seed).sample(others, min(drawn, len(others)))
    rows = [*dict.fromkeys(rows), *sorted(picked)] or [0]

    tokenizer = load_tokenizer(config.model)
    prepared = prepare_dataset(config.data, tokenizer)
    index.require(run_fingerprints(config.model, prepared))
    if html:
        examples = [shown_example(tokenizer, row, prepared.dataset[row], index.scores(row)) for row in rows]
        subtitle = f"{config.model.name_or_path}: {len(rows)} of {len(index):,} examples in {config.index_path}"
        if not isinstance(rule.definition, Top):
            subtitle += f'; the run itself selects by rule "{rule.rule}", this page by rule "top"'
        html.write_text(render_page(examples, rule, subtitle), encoding="utf-8")
        yield f"\npage: {html}"
    if figures:
        for path in _figures_of_examples(config, prepared, rows[:_EXAMPLES_IN_A_FIGURE], figures):
            yield f"figure: {path}"
    if not (html or figures):
        for row in rows:
            example = prepared.dataset[row]
            selected = collator.select(example)
            yield f"\nrow {row}, {len(example['input_ids'])} tokens, {len(selected)} selected"
            yield render_example(tokenizer, example["input_ids"], example["labels"], selected, color)


def show_runs(folders: Sequence[Path], figures: Path) -> Iterator[str]:
    """Writes the figures that compare training runs, loss against r, training curves and memory; yields their names."""
    from tokenseek.reporting.figures import RunMetrics, figure_curves, figure_memory, figure_ratio, save_figure

    runs = [RunMetrics(folder) for folder in folders]
    for name, draw in (("loss-by-ratio", figure_ratio), ("training-curves", figure_curves), ("memory", figure_memory)):
        for path in save_figure(draw(runs), figures / name):
            yield f"figure: {path}"


def _figures_of_examples(config: RunConfig, prepared: PreparedData, rows: Sequence[int], folder: Path) -> list[Path]:
    from tokenseek.reporting.figures import figure_case, figure_examples, figure_layers, save_figure

    model = load_model(config.model.model_copy(update={"attn_implementation": "eager"}))
    maps = {}
    for row in rows:
        example = prepared.dataset[row]
        maps[f"row {row}"] = token_maps(model, example["input_ids"], example["labels"])
    first = maps[f"row {rows[0]}"]
    written = save_figure(figure_case(first), folder / f"case-row-{rows[0]}")
    written += save_figure(figure_layers(first), folder / f"layers-row-{rows[0]}")
    if len(maps) > 1:
        written += save_figure(figure_examples(maps), folder / "examples")
    return written
