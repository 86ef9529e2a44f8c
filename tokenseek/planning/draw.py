"""Pictures of plans: memory against length and against the share of tokens, and a step's memory over its time. Needs
matplotlib (the extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenseek.config.sizes import format_size
from tokenseek.errors import UserError
from tokenseek.planning.ledger import CATEGORIES
from tokenseek.planning.step import MemoryPlan

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise UserError("--plot needs matplotlib: pip install 'tokenseek[report]'.") from error

GIB = 2**30
_COLOURS = ("#8a929c", "#b9c0c8", "#d5dae0", "#2a6fbb", "#7fb0e0", "#d9741a", "#f0c49b")
# Curves lie on each other where only the host holds more.
_LINES = ("-", "-", "-", "-", "-", "--")


def plan_figure(plans: Sequence[MemoryPlan], budget: int | None = None) -> Figure:
    """Memory against the share of tokens, and over the time of the steps that hold most and least."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    against, *steps = figure.subplots(1, 3)
    _against_ratio(against, plans, budget)
    ordered = sorted(plans, key=lambda plan: plan.peak)
    top = ordered[-1].peak / GIB * 1.06
    for axes, plan in zip(steps, (ordered[-1], ordered[0]), strict=True):
        _over_time(axes, plan, top)
    _legends_below(figure, against, steps[0])
    return figure


def length_figure(curves: Mapping[str, Mapping[int, MemoryPlan]], budgets: Sequence[int]) -> Figure:
    """Memory against the length of an example, a curve for each method, and over the time of the longest steps.

    Args:
        curves: of each method, plans by length.
        budgets: lines across.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    against, *steps = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for number, (name, of_lengths) in enumerate(curves.items()):
        lengths = sorted(of_lengths)
        peaks = [of_lengths[n].peak / GIB for n in lengths]
        # Between lengths that are planned, memory is on a line, which is none on these axes.
        between = np.geomspace(lengths[0], lengths[-1], 200)
        style: dict[str, Any] = dict(color=f"C{number}", label=name, linestyle=_LINES[number % len(_LINES)])
        against.plot(between, np.interp(between, lengths, peaks), linewidth=2 - 0.15 * number, **style)
    for budget in budgets:
        against.axhline(budget / GIB, color="#8a929c", linewidth=0.8, linestyle=":")
    against.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of an example",
        ylabel="planned peak",
        ylim=(None, 2 * max(budgets) / GIB),
    )
    against.set_yticks([budget / GIB for budget in budgets], [format_size(budget) for budget in budgets])
    against.minorticks_off()
    against.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    against.set_title("memory and length", fontsize=9)
    fitting = [plan for of_lengths in curves.values() for plan in of_lengths.values() if plan.peak <= max(budgets)]
    ordered = sorted(fitting, key=lambda plan: plan.tokens[1])
    if ordered:
        chunked = [plan for plan in ordered if plan.method.ratio is None]
        for axes, plan in zip(steps, (chunked[-1] if chunked else ordered[0], ordered[-1]), strict=True):
            _over_time(axes, plan, max(budgets) / GIB * 1.06)
        _legends_below(figure, against, steps[0])
    return figure


def _legends_below(figure: Figure, against: Axes, step: Axes) -> None:
    """What the curves are and what the areas are, where neither hides anything."""
    small: dict[str, Any] = dict(fontsize=7, frameon=False)
    figure.legend(*against.get_legend_handles_labels(), loc="outside lower left", ncols=2, **small)
    figure.legend(*step.get_legend_handles_labels(), loc="outside lower right", ncols=4, **small)


def _against_ratio(axes: Axes, plans: Sequence[MemoryPlan], budget: int | None) -> None:
    for recompute, colour in ((False, "#2a6fbb"), (True, "#d9741a")):
        own = [plan for plan in plans if plan.method.recompute == recompute]
        on_device = [plan for plan in own if plan.method.kv_storage in (None, "device")]
        shares = sorted((p.method.ratio, p.peak / GIB) for p in on_device if p.method.ratio is not None)
        words = ", recomputed" if recompute else ""
        if shares:
            axes.plot(*zip(*shares, strict=True), color=colour, marker=".", label=f"TokenSeek{words}")
        for plan in own:
            if plan.method.ratio is None:
                style: dict[str, Any] = dict(
                    color=colour, linewidth=1, linestyle="--" if not plan.method.chunked_loss else ":"
                )
                axes.axhline(plan.peak / GIB, label=str(plan.method), **style)
    if budget:
        axes.axhline(budget / GIB, color="#8a929c", label="budget")
    axes.set(xlabel="share of tokens selected, r", ylabel="planned peak, GiB", ylim=(0, None))
    axes.set_title("memory and share", fontsize=9)


def _over_time(axes: Axes, plan: MemoryPlan, top: float) -> None:
    """Stretches of the step, as wide as they take and as high as the most that is alive in them."""
    ends = np.cumsum([0.0, *(stretch.seconds for stretch in plan.stretches)])
    ends /= ends[-1] or 1
    bottom = np.zeros(len(plan.stretches))
    for name, colour in zip(CATEGORIES, _COLOURS, strict=True):
        held = np.array([stretch.parts[name] / GIB for stretch in plan.stretches])
        label = name.replace("keys_values", "keys and values")
        axes.stairs(bottom + held, ends, baseline=bottom, fill=True, color=colour, label=label)
        bottom = bottom + held
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel="share of the step's time", ylabel="GiB")
    axes.set_title(f"{plan.method}\n{plan.tokens[0]} x {plan.tokens[1]:,} tokens", fontsize=9)
