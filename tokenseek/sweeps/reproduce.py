"""`tokenseek reproduce`: the runs of one of the paper's tables, and their results beside the paper's figures."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenseek.config import RunConfig, override_config
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
    trials = []
    for seed in range(seeds):
        for row in rows:
            settings = {**row_settings(row, config, extra_data), "seed": seed, "selection.seed": seed}
            trials.append(Trial(f"{row.name}-seed-{seed}", settings, {"row": row.name, "seed": seed}))
    folder = Path(config.output_dir) / f"table-{Path(name).stem}"
    if table.shows == "scoring":  # which is measured, so that an index made before is of no use
        config = override_config(config, {"scoring.index": str(folder / "index.arrow")})
    measure = _evaluation(tasks, data, eval_limit) if tasks else None
    sweep = Sweep(folder, short_runs(config, steps, hold_out), trials, measure)
    sweep.run()
    if number:
        return None
    text = render(table, rows, sweep.rows(), paper or table.paper[0])
    path = sweep.folder / "table.md"
    path.write_text(f"# Table {name}: {table.title}\n\n{text}\n", encoding="utf-8")
    _log.info(f"\n{text}\n\nTable: {path}; rows: {sweep.rows_file}")
    return path


def _evaluation(tasks: str, data: Sequence[Path], limit: int | None) -> Measure:
    def measure(config: RunConfig, summary: TrainingSummary) -> dict[str, Any]:
        from tokenseek.evaluation import evaluate  # late: lm-eval is an extra

        model, final = config.model, Path(summary.final)
        if config.peft is None:
            model = model.model_copy(update={"name_or_path": str(final), "revision": None})
        adapter = final if config.peft else None
        result = evaluate(model, adapter, tasks, data=data, held_out=config.eval_data, limit=limit)
        return {"scores": result.columns(), "tasks": tasks, "eval_limit": limit}

    return measure


def render(table: PaperTable, rows: Sequence[TableRow], results: Sequence[Row], paper: str) -> str:
    """A Markdown table: every column of the paper with its own figure beside the measured one, then what else is."""
    groups = {group.values[0]: group for group in grouped(map(_flat, results), "row")}
    full = groups.get("full")
    columns = {row.name: _measured(table, groups[row.name], full) for row in rows if row.name in groups}
    own = dict.fromkeys(title for measured in columns.values() for title in measured)
    pairs = [(title, f"{title} (paper)") for title in table.columns]
    titles = ["setting"]
    for title, of_paper in pairs:
        titles += [of_paper, title] if title in own else [of_paper]
    others = [title for title in own if title not in table.columns]
    lines = []
    for row in rows:
        measured = columns.get(row.name, {})
        figures = row.paper.get(paper, [None] * len(table.columns))
        line = [row.label]
        for title, figure in zip(table.columns, figures, strict=True):
            line.append("" if figure is None else f"{figure:g}")
            if title in own:
                line.append(measured.get(title, ""))
        lines.append([*line, *(measured.get(title, "") for title in others)])
    return f"Figures of the paper: {paper}. {_seeds(groups)}\n\n" + markdown([*titles, *others], lines)


def _seeds(groups: dict[str, Group]) -> str:
    counts = {len(group.rows) for group in groups.values()}
    return "Mean (least to greatest) over seeds." if counts - {1} else "One seed."


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
    if table.shows == "variance":
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
