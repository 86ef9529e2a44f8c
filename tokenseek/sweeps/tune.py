"""`tokenseek tune`: the learning rate, alpha, beta, r and other settings by validation, in short runs.

The held-out loss decides. As r grows it falls, more often than not, and memory and time rise: several ratios are for
seeing what a smaller one costs, and `tolerance` says how much of the loss it may cost.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
_RATIO = "selection.ratio"


@dataclass(frozen=True)
class Grid:
    """What is tried, and for how long.

    Attributes:
        weights: pairs of alpha and beta; the paper's where nothing else is tried.
        ratios: shares of the tokens; that of the configuration where empty.
        settings: values to try, by dotted path (`{"training.learning_rate": [1e-3, 2e-3]}`).
        seeds: how many runs of each setting, of the seeds 0, 1, ...
        steps: optimizer steps of a run.
        hold_out: training examples that decide, where the configuration has no eval_data.
        tolerance: nats per token by which the loss of a smaller ratio may be above the least.
    """

    weights: Sequence[tuple[float, float]] = ()
    ratios: Sequence[float] = ()
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: int = 1
    steps: int = 50
    hold_out: int = 100
    tolerance: float = 0.0

    @property
    def tries_weights(self) -> bool:
        """Whether alpha, beta and r are tried as the paper does; else what `settings` names, and r where given."""
        return bool(self.weights) or not self.settings

    @property
    def columns(self) -> tuple[str, ...]:
        """What is tried: `alpha`, `beta`, `ratio`, and dotted paths."""
        own = _GRID if self.tries_weights else ("ratio",) if self.ratios else ()
        return (*own, *self.settings)

    def points(self, config: RunConfig) -> list[tuple[Any, ...]]:
        """The values of every setting, in the order of `columns`."""
        values: list[list[tuple[Any, ...]]] = [[(value,) for value in tried] for tried in self.settings.values()]
        shares: Sequence[Any] = self.ratios or [config.selection.ratio]
        ratios: list[tuple[Any, ...]] = [(ratio,) for ratio in shares]
        if self.tries_weights:
            weights: list[tuple[Any, ...]] = list(self.weights or PAPER_WEIGHTS)
            values = [ratios, weights, *values]
        elif self.ratios:
            values = [ratios, *values]
        points: list[tuple[Any, ...]] = [tuple(itertools.chain(*point)) for point in itertools.product(*values)]
        return [(*p[1:3], p[0], *p[3:]) for p in points] if self.tries_weights else points


def tune_sweep(config: RunConfig, grid: Grid) -> Sweep:
    """The runs of a grid, in ``output_dir/tune``; their index is that of the configuration.

    Raises:
        UserError: for a value that no run can have.
    """
    columns = [_path_of(column) for column in grid.columns]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{twice[0]} is tried by --grid and by --weights or --ratios; leave one out")
    scores = rule_named(config.selection.rule).needs_scores
    if grid.tries_weights and not (config.training.ditching and scores):
        raise UserError(
            f"tune chooses how tokens are scored, and training.ditching={str(config.training.ditching).lower()} with "
            f"selection.rule={config.selection.rule} does not; set training.ditching=true and a rule such as top, or "
            "name what is to be tried (--grid training.learning_rate=1e-3,2e-3)."
        )
    if config.selection.ratio == "auto" and not grid.ratios and _RATIO not in grid.settings:
        raise UserError("selection.ratio is auto, which no short run settles; give --ratios or set a number")
    trials = []
    for seed in range(grid.seeds):
        for point in grid.points(config):
            labels = dict(zip(grid.columns, point, strict=True)) | {"seed": seed}
            settings = dict(zip(columns, point, strict=True)) | {"selection.seed": seed, "seed": seed}
            trials.append(Trial("-".join(_word(*label) for label in labels.items()), settings, labels))
    return Sweep(Path(config.output_dir) / "tune", short_runs(config, grid.steps, grid.hold_out), trials)


def _path_of(column: str) -> str:
    return f"selection.{column}" if column in _GRID else column


def _word(column: str, value: Any) -> str:
    """A part of a trial's name, which is a folder's."""
    name = "r" if column == "ratio" else column.removeprefix("training.").removeprefix("selection.")
    return re.sub(r"[^\w.,-]+", "_", f"{name}-{_shown(value)}")


def _shown(value: Any) -> str:
    """As `--set` takes it."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value


def short_runs(config: RunConfig, steps: int | None, hold_out: int) -> RunConfig:
    """The configuration for runs of so many steps whose result is a held-out loss and not a checkpoint.

    Warm-up takes a tenth of the steps at most. Data is held out where the configuration has none.
    """
    settings: dict[str, Any] = {
        "training.save_strategy": "no",
        "training.eval_strategy": "no",
        "training.resume": "never",
        "training.report_to": [],
    }
    if steps is not None:
        settings["training.max_steps"] = steps
        settings["training.warmup_steps"] = min(config.training.warmup_steps, steps // 10)
    if config.eval_data is None and config.data.hold_out is None:
        settings["data.hold_out"] = hold_out
    return override_config(config, settings)


def groups_of(sweep: Sweep, columns: Sequence[str] = _GRID) -> list[Group]:
    """The runs of a sweep by their settings, those of the least held-out loss first."""
    return sorted(grouped(sweep.rows(), *columns), key=lambda group: group.mean("loss_after") or float("inf"))


def choose(groups: Sequence[Group], tolerance: float, columns: Sequence[str] = _GRID) -> Group:
    """The setting with the least mean loss; or of those within `tolerance` of it, the one with the smallest ratio.

    Raises:
        UserError: every setting failed.
    """
    losses = [(loss, group) for group in groups if (loss := group.mean("loss_after")) is not None]
    if not losses:
        raise UserError(f"no run finished: {groups[0].error}")
    least = min(loss for loss, _ in losses)
    ratio = next((number for number, column in enumerate(columns) if _path_of(column) == _RATIO), None)
    near = [
        (0 if ratio is None else group.values[ratio], loss, group)
        for loss, group in losses
        if loss <= least + tolerance
    ]
    return min(near, key=lambda found: found[:2])[2]


def table(groups: Sequence[Group], columns: Sequence[str] = _GRID) -> str:
    """A row of Markdown for each group: its settings, and means over its runs."""
    tried = ["r" if column == "ratio" else column for column in columns]
    titles = [*tried, "held-out loss", "selected with a loss", "seconds", "peak memory"]
    lines = []
    for group in groups:
        supervised, seconds = group.mean("supervised_share"), group.mean("seconds")
        lines.append(
            [
                *map(_shown, group.values),
                group.spread("loss_after"),
                "" if supervised is None else f"{supervised:.0%}",
                "" if seconds is None else f"{seconds:.1f}",
                gibibytes(group.mean("peak_memory_bytes")),
            ]
        )
    return markdown(titles, lines)


def report(config: RunConfig, sweep: Sweep, grid: Grid, preset: Path | None = None) -> Path:
    """Log the table of a finished sweep and write the chosen preset, by default ``tune/preset.yaml``."""
    groups = groups_of(sweep, grid.columns)
    _log.info(f"\n{table(groups, grid.columns)}")
    best = choose(groups, grid.tolerance, grid.columns)
    before = best.mean("loss_before")
    _log.info(f"\nHeld-out loss before training: {before:.4f} nats per token. Runs of {grid.steps} steps.")
    settings = {_path_of(name): value for name, value in zip(grid.columns, best.values, strict=True)}
    _log.info(f"Chosen: {', '.join(f'{name} {_shown(value)}' for name, value in settings.items())}.")
    words = [shlex.quote(f"{name}={_shown(value)}") for name, value in settings.items()]
    _log.info("  " + " ".join(f"--set {word}" for word in words))
    path = preset or sweep.folder / "preset.yaml"
    chosen = override_config(config, settings)
    if chosen.needs_index:
        chosen = override_config(chosen, {"scoring.index": str(config.index_path)})
    head = f"# Chosen by `tokenseek tune` with a held-out loss of {best.spread('loss_after')} nats per token.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(head + text, encoding="utf-8")
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
