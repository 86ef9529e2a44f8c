"""`tokenseek tune`: alpha, beta and r by validation, in short runs that reuse one index.

The held-out loss decides. As r grows it falls, more often than not, and memory and time rise: several ratios are for
seeing what a smaller one costs, and `tolerance` says how much of the loss it may cost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokenseek.config import RunConfig, override_config
from tokenseek.errors import UserError
from tokenseek.launching.processes import leave_launch
from tokenseek.selection import rule_named
from tokenseek.sweeps.sweep import Sweep, Trial
from tokenseek.sweeps.tables import Group, gibibytes, grouped, markdown

_log = logging.getLogger(__name__)

PAPER_WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (5.0, 5.0), (7.0, 3.0), (3.0, 7.0))
_GRID = ("alpha", "beta", "ratio")


@dataclass(frozen=True)
class Grid:
    """What is tried, and for how long.

    Attributes:
        weights: pairs of alpha and beta.
        ratios: shares of the tokens; that of the configuration where empty.
        seeds: how many runs of each setting, of the seeds 0, 1, ...
        steps: optimizer steps of a run.
        hold_out: training examples that decide, where the configuration has no eval_data.
        tolerance: nats per token by which the loss of a smaller ratio may be above the least.
    """

    weights: Sequence[tuple[float, float]] = PAPER_WEIGHTS
    ratios: Sequence[float] = ()
    seeds: int = 1
    steps: int = 50
    hold_out: int = 100
    tolerance: float = 0.0


def tune_sweep(config: RunConfig, grid: Grid) -> Sweep:
    """The runs of a grid, in ``output_dir/tune``; their index is that of the configuration.

    Raises:
        UserError: for a value that no run can have.
    """
    if not config.training.ditching or not rule_named(config.selection.rule).needs_scores:
        raise UserError(
            f"tune chooses how tokens are scored, and training.ditching={str(config.training.ditching).lower()} with "
            f"selection.rule={config.selection.rule} does not; set training.ditching=true and a rule such as top."
        )
    ratios: Sequence[float | str] = grid.ratios or [config.selection.ratio]
    if "auto" in ratios:
        raise UserError("selection.ratio is auto, which no short run settles; give --ratios or set a number")
    trials = []
    for seed in range(grid.seeds):
        for ratio in ratios:
            for alpha, beta in grid.weights:
                labels = {"alpha": alpha, "beta": beta, "ratio": ratio, "seed": seed}
                settings = {f"selection.{name}": labels[name] for name in (*_GRID, "seed")} | {"seed": seed}
                name = f"alpha-{alpha:g}-beta-{beta:g}-r-{ratio:g}-seed-{seed}"
                trials.append(Trial(name, settings, labels))
    return Sweep(Path(config.output_dir) / "tune", short_runs(config, grid.steps, grid.hold_out), trials)


def short_runs(config: RunConfig, steps: int | None, hold_out: int) -> RunConfig:
    """The configuration for runs of so many steps whose result is a held-out loss and not a checkpoint.

    Warm-up takes a tenth of the steps at most. Data is held out where the configuration has none.
    """
    settings: dict[str, Any] = {
        "training.save_strategy": "no",
        "training.eval_strategy": "no",
        "training.resume": "never",
        "training.report_to": [],
        "scoring.index": str(config.index_path),
    }
    if steps is not None:
        settings["training.max_steps"] = steps
        settings["training.warmup_steps"] = min(config.training.warmup_steps, steps // 10)
    if config.eval_data is None and config.data.hold_out is None:
        settings["data.hold_out"] = hold_out
    return override_config(config, settings)


def groups_of(sweep: Sweep) -> list[Group]:
    return sorted(grouped(sweep.rows(), *_GRID), key=lambda group: group.mean("loss_after") or float("inf"))


def choose(groups: Sequence[Group], tolerance: float) -> Group:
    """The setting with the least mean loss; or of those within `tolerance` of it, the one with the smallest ratio.

    Raises:
        UserError: every setting failed.
    """
    losses = [(loss, group) for group in groups if (loss := group.mean("loss_after")) is not None]
    if not losses:
        raise UserError(f"no run finished: {groups[0].error}")
    least = min(loss for loss, _ in losses)
    near = [(group.values[2], loss, group) for loss, group in losses if loss <= least + tolerance]
    return min(near, key=lambda found: found[:2])[2]


def table(groups: Sequence[Group]) -> str:
    titles = ["alpha, beta", "r", "held-out loss", "selected with a loss", "seconds", "peak memory"]
    lines = []
    for group in groups:
        alpha, beta, ratio = group.values
        supervised, seconds = group.mean("supervised_share"), group.mean("seconds")
        lines.append(
            [
                f"{alpha:g}, {beta:g}",
                f"{ratio:g}",
                group.spread("loss_after"),
                "" if supervised is None else f"{supervised:.0%}",
                "" if seconds is None else f"{seconds:.1f}",
                gibibytes(group.mean("peak_memory_bytes")),
            ]
        )
    return markdown(titles, lines)


def report(config: RunConfig, sweep: Sweep, grid: Grid, preset: Path | None = None) -> Path:
    """Log the table of a finished sweep and write the chosen preset, by default ``tune/preset.yaml``."""
    groups = groups_of(sweep)
    _log.info(f"\n{table(groups)}")
    chosen = choose(groups, grid.tolerance)
    alpha, beta, ratio = chosen.values
    before = chosen.mean("loss_before")
    _log.info(f"\nHeld-out loss before training: {before:.4f} nats per token. Runs of {grid.steps} steps.")
    _log.info(f"Chosen: alpha {alpha:g}, beta {beta:g}, r {ratio:g}.")
    path = preset or sweep.folder / "preset.yaml"
    settings = {f"selection.{name}": value for name, value in zip(_GRID, chosen.values, strict=True)}
    values = override_config(config, {**settings, "scoring.index": str(config.index_path)}).model_dump(mode="json")
    head = f"# Chosen by `tokenseek tune` with a held-out loss of {chosen.spread('loss_after')} nats per token.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    _log.info(f"Preset: {path} (tokenseek train --preset {path})")
    return path


def tune(config: RunConfig, grid: Grid, preset: Path | None = None) -> Path | None:
    """Run a grid and report it; every process of a launch calls this, and takes runs of its own.

    Returns:
        The chosen preset, in the launch's first process.
    """
    number = leave_launch()
    sweep = tune_sweep(config, grid)
    sweep.run()
    return report(config, sweep, grid, preset) if number == 0 else None
