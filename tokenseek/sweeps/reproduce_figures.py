"""Figures 3, 5 and 6 of the paper from the rows of a sweep. Needs matplotlib (the extra `report`)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tokenseek.reporting.figures import BLUE, GREEN, GREY, ORANGE, Figure, save_figure
from tokenseek.sweeps.paper import PaperTable
from tokenseek.sweeps.sweep import Row
from tokenseek.sweeps.tables import Group, grouped

_COLOURS = {"full": BLUE, "loha": GREEN, "qlora": ORANGE}


def draw_table(table: PaperTable, rows: Sequence[Row], path: Path) -> Path | None:
    """Write the figure that a table shows as PNG and SVG; None where there is nothing to draw yet."""
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return None
    figure = {"ratio": _by_ratio, "curves": _curves, "memory": _memory}[table.shows](table, rows)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
    return path


def _by_ratio(table: PaperTable, rows: Sequence[Row]) -> Figure:
    """Fig. 3: least, mean and greatest over seeds, of random and of sought tokens."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    by_average = all("Average" in row.get("scores", {}) for row in rows)
    for rule, colour, name in (("top", GREEN, "TokenSeek"), ("random", GREY, "random")):
        own = [row for row in rows if row["settings"]["selection.rule"] == rule]
        by_ratio: dict[float, list[float]] = {}
        for row in sorted(own, key=lambda row: row["settings"]["selection.ratio"]):
            value = row["scores"]["Average"] if by_average else row["loss_after"]
            by_ratio.setdefault(100 * row["settings"]["selection.ratio"], []).append(value)
        if not by_ratio:
            continue
        ratios, values = list(by_ratio), list(by_ratio.values())
        axes.plot(ratios, [statistics.mean(each) for each in values], "o-", color=colour, label=name)
        axes.fill_between(ratios, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)
    axes.set(
        xlabel="tuned tokens (%)",
        ylabel="average score" if by_average else "held-out loss (nats per token)",
        title=table.title,
    )
    axes.set_xlim(5, 55)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _curves(table: PaperTable, rows: Sequence[Row]) -> Figure:
    """Fig. 5: training loss by step; a colour for each method, lighter for fewer tokens."""
    figure = Figure(figsize=(9.4, 4), layout="constrained")
    axes = figure.subplots()
    for row in table.rows:
        found = next((each for each in rows if each["row"] == row.name), None)
        if found:
            steps, losses = zip(*found["losses"], strict=True)
            alpha = 0.45 if row.settings["selection.ratio"] < 0.5 else 1.0
            axes.plot(steps, losses, color=_COLOURS[row.method], alpha=alpha, lw=1.5, label=row.label)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)", title=table.title)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)  # curves fill the axes
    return figure


def _memory(table: PaperTable, rows: Sequence[Row]) -> Figure:
    """Fig. 6: bars of the average, dashed lines at the peak."""
    groups = {group.values[0]: group for group in grouped(rows, "row")}
    shown = [row for row in table.rows if row.name in groups]
    figure = Figure(figsize=(7.2, 0.38 * len(shown) + 1.4), layout="constrained")
    axes = figure.subplots()
    peaks = [_mebibytes(groups[row.name], "step_peak_bytes") for row in shown]
    averages = [_mebibytes(groups[row.name], "average_memory_bytes") for row in shown]
    bars = axes.barh([row.label for row in shown], averages, color=[_COLOURS[row.method] for row in shown])
    for bar, peak in zip(bars, peaks, strict=True):
        x = [peak, peak]
        y = [bar.get_y(), bar.get_y() + bar.get_height()]
        axes.plot(x, y, "--", color="black", lw=1.4, label="peak" if bar is bars[0] else None)
        axes.plot([bar.get_width(), peak], [sum(y) / 2] * 2, color=GREY, lw=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="memory (MiB): bars the average, dashed lines the peak", title=table.title)
    axes.margins(x=0.04)
    return figure


def _mebibytes(group: Group, column: str) -> float:
    return (group.mean(column) or 0) / 2**20
