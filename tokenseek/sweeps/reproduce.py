"""`tokenseek reproduce`: the runs of one of the paper's tables, and their results beside the paper's figures."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenseek.config import RunConfig, override_config
from tokenseek.evaluation.benchmarks import BENCHMARKS
from tokenseek.launching.processes import leave_launch
from tokenseek.runs.summary import TrainingSummary
from tokenseek.sweeps.paper import PaperTable, TableRow, row_settings
from tokenseek.sweeps.sweep import Measure, Row, Sweep, Trial
from tokenseek.sweeps.tables import Group, gibibytes, grouped, markdown
from tokenseek.sweeps.tune import short_runs

_log = logging.getLogger(__name__)

_PEAK = "Max. mem. %"
_AVERAGE_MEMORY = "Ave. mem. %"
_LOSS = "Held-out loss"
_TIMES = {"Seconds", "Hours", "Training seconds"}
_BENCHMARKS = {benchmark.column for benchmark in BENCHMARKS.values()}
# Tables whose rows are drawn, too.
FIGURES = ("Fig3", "Fig5", "Fig6")
_AVERAGE = "Average"


def reproduce(
    name: str,
    table: PaperTable,
    config: RunConfig,
    *,
    rows: Sequence[TableRow],
    seeds: int = 1,
    steps: int | None = None,
    hold_out: int = 100,
    paper: str | None = None,
    extra_data: Path | None = None,
    tasks: str | None = None,
    data: Sequence[Path] = (),
    eval_limit: int | None = None,
) -> Path | None:
    """Run what is missing of a table, log it and write it; every process of a launch calls this.

    Args:
        name: of the folder, ``output_dir/table-NAME``.
        rows: those of the table to run.
        tasks, data, eval_limit: what every trained model is evaluated on, as for :func:`tokenseek.evaluation.evaluate`.

    Returns:
        The written table, in the launch's first process.
    """
    number = leave_launch()
    table.require_measurable(rows, config, seeds, tasks)
    trials = [_trial(row, seed, config, extra_data) for seed in range(seeds) for row in rows]
    folder = Path(config.output_dir) / f"table-{Path(name).stem}"
    if table.shows == "scoring":  # which is measured, so that an index made before is of no use
        config = override_config(config, {"scoring.index": str(folder / "index.arrow")})
    scores = evaluation(tasks, data, eval_limit) if tasks else None

    def measure(run: RunConfig, summary: TrainingSummary) -> dict[str, Any]:
        losses = {"losses": training_losses(run)} if table.shows == "curves" else {}
        return {**(scores(run, summary) if scores else {}), **losses}

    sweep = Sweep(folder, short_runs(config, steps, hold_out), trials, measure)
    sweep.run()
    if number:
        return None
    text = render(table, rows, sweep.rows(), paper or table.paper[0])
    path = sweep.folder / "table.md"
    path.write_text(f"# Table {name}: {table.title}\n\n{text}\n", encoding="utf-8")
    _log.info(f"\n{text}\n\nTable: {path}; rows: {sweep.rows_file}")
    if table.is_drawn:
        from tokenseek.sweeps.reproduce_figures import draw_table  # late: matplotlib is an extra

        if figure := draw_table(table, sweep.rows(), sweep.folder / "figure"):
            _log.info(f"Figure: {figure}.png, {figure}.svg")
    return path


def _trial(row: TableRow, seed: int, config: RunConfig, extra_data: Path | None) -> Trial:
    settings = {**row_settings(row, config, extra_data), "seed": seed, "selection.seed": seed}
    return Trial(f"{row.name}-seed-{seed}", settings, {"row": row.name, "seed": seed})


def evaluation(tasks: str, data: Sequence[Path], limit: int | None) -> Measure:
    """Scores of a trained model, for a sweep's rows."""

    def measure(config: RunConfig, summary: TrainingSummary) -> dict[str, Any]:
        from tokenseek.evaluation import evaluate  # late: lm-eval is an extra

        model, final = config.model, Path(summary.final)
        if config.peft is None:
            model = model.model_copy(update={"name_or_path": str(final), "revision": None})
        adapter = final if config.peft else None
        result = evaluate(model, adapter, tasks, data=data, held_out=config.eval_data, limit=limit)
        return {"scores": result.columns(), "tasks": tasks, "eval_limit": limit}

    return measure


def training_losses(config: RunConfig) -> list[list[float]]:
    """(step, training loss) of a finished run, from its metrics."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [[line["step"], round(line["loss"], 4)] for line in map(json.loads, lines) if "loss" in line]


def render(table: PaperTable, rows: Sequence[TableRow], results: Sequence[Row], paper: str) -> str:
    """A Markdown table: every column of the paper with its own figure beside the measured one, then what else is."""
    several = len({row["seed"] for row in results}) > 1
    seeds = "Mean (least to greatest) over seeds." if several else "One seed."
    return f"Figures of the paper: {paper}. {seeds}\n\n" + markdown(*cells(table, rows, results, [paper]))


def cells(
    table: PaperTable, rows: Sequence[TableRow], results: Sequence[Row], papers: Sequence[str], brief: bool = False
) -> tuple[list[str], list[list[str]]]:
    """The titles and lines of :func:`render`.

    Args:
        papers: of the first of these models that a row has figures for, they stand in it.
        brief: without seconds, and without single benchmarks that were not run.
    """
    groups = {group.values[0]: group for group in grouped(map(_flat, results), "row")}
    full = groups.get("full")
    columns = {row.name: _measured(table, groups[row.name], full) for row in rows if row.name in groups}
    own = dict.fromkeys(title for measured in columns.values() for title in measured)
    if brief:
        own = {title: None for title in own if title not in _TIMES}
    shown = [title for title in table.columns if title in own or not brief or title not in _BENCHMARKS]
    titles = ["setting"]
    for title in shown:
        titles += [f"{title} (paper)", title] if title in own else [f"{title} (paper)"]
    others = [title for title in own if title not in table.columns]
    lines = []
    for row in rows:
        measured = columns.get(row.name, {})
        found = next((row.paper[model] for model in papers if model in row.paper), [None] * len(table.columns))
        figures = dict(zip(table.columns, found, strict=True))
        line = [row.label]
        for title in shown:
            line.append("" if figures[title] is None else f"{figures[title]:g}")
            if title in own:
                line.append(measured.get(title, ""))
        lines.append([*line, *(measured.get(title, "") for title in others)])
    return [*titles, *others], lines


def _flat(row: Row) -> Row:
    return {**row, **row.get("scores", {})}


def _measured(table: PaperTable, group: Group, full: Group | None) -> dict[str, str]:
    """Texts by column title."""
    if group.error:
        return {"Error": group.error}
    average, peak = group.mean("average_memory_bytes"), group.mean("step_peak_bytes")
    full_average = full.mean("average_memory_bytes") if full else None
    full_peak = full.mean("step_peak_bytes") if full else None
    found = {title: group.spread(title, 2) for title in group.rows[0].get("scores", {})}
    loss = _AVERAGE if _AVERAGE in found else "loss_after"
    if table.shows == "variance" and len(group.rows) > 1:
        found["Variance"] = f"{statistics.variance(group.numbers(loss)):.5f}"
    if table.shows == "scoring":
        scoring = group.mean("scoring_average_memory_bytes")
        if scoring is not None:
            found["Seconds"] = f"{group.mean('scoring_seconds'):.1f}"
            found["Memory %"] = _share(scoring, full_average)
            found["Scoring's average memory"] = gibibytes(scoring)
            found["Scoring's peak memory"] = gibibytes(group.mean("scoring_peak_memory_bytes"))
    if table.shows == "time" and (seconds := group.mean("seconds")) is not None:
        found["Hours"] = f"{seconds / 3600:.4f}"
    if group.mean("loss_after") is not None:
        found[_LOSS] = group.spread("loss_after")
    if full_average and full_peak:
        found[_AVERAGE_MEMORY], found[_PEAK] = _share(average, full_average), _share(peak, full_peak)
    found["Selected with a loss"] = f"{group.mean('supervised_share'):.0%}"
    found["Average memory"], found["Peak memory"] = gibibytes(average), gibibytes(peak)
    found["Training seconds"] = f"{group.mean('seconds'):.1f}"
    return found


def _share(size: float | None, full: float | None) -> str:
    """In percent; empty where either was not measured."""
    return f"{100 * size / full:.1f}" if size and full else ""
