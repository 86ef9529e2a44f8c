"""Pictures of plans: memory against length and against the share of tokens, and a step's memory over its time. Needs
matplotlib (the extra `report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def plan_figure(plans: Sequence[MemoryPlan], budget: int | None = None) -> Figure:
    """Memory against the share of tokens, and over the time of the steps that hold most and least."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    against, *steps = figure.subplots(1, 3)
    _against_ratio(against, plans, budget)
    ordered = sorted(plans, key=lambda plan: plan.peak)
    top = ordered[-1].peak / GIB * 1.06
    for axes, plan in zip(steps, (ordered[-1], ordered[0]), strict=True):
        _over_time(axes, plan, top)
    steps[-1].legend(*_reversed_legend(steps[-1]), fontsize=7, loc="upper right")
    return figure


def length_figure(curves: Mapping[str, Mapping[int, MemoryPlan]], budgets: Sequence[int]) -> Figure:
    """Memory against the length of an example, a curve for each method, and over the time of the longest steps.

    Args:
        curves: of each method, plans by length.
        budgets: lines across.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    against, *steps = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for name, of_lengths in curves.items():
        lengths = sorted(of_lengths)
        against.plot(lengths, [of_lengths[n].peak / GIB for n in lengths], marker=".", label=name)
    for budget in budgets:
        against.axhline(budget / GIB, color="#8a929c", linewidth=0.8, linestyle=":")
    against.set(
        xscale="log", yscale="log", xlabel="tokens of an example", ylabel="planned peak, GiB", title="memory and length"
    )
    against.legend(fontsize=7)
    fitting = [plan for of_lengths in curves.values() for plan in of_lengths.values() if plan.peak <= max(budgets)]
    ordered = sorted(fitting, key=lambda plan: plan.tokens[1])
    if ordered:
        chunked = [plan for plan in ordered if plan.method.ratio is None]
        for axes, plan in zip(steps, (chunked[-1] if chunked else ordered[0], ordered[-1]), strict=True):
            _over_time(axes, plan, max(budgets) / GIB * 1.06)
        steps[-1].legend(*_reversed_legend(steps[-1]), fontsize=7, loc="lower right")
    return figure


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
    axes.set(xlabel="share of tokens selected, r", ylabel="planned peak, GiB", title="memory and share", ylim=(0, None))
    axes.legend(fontsize=7)


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


def _reversed_legend(axes: Axes):
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]
