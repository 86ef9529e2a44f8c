"""`tokenseek tune`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenseek.commands.arguments import add_config_arguments, configuration, pair, positive, split_ratios
from tokenseek.config import RunConfig, override_config
from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError

HELP = "choose the learning rate, alpha, beta, r or other settings by the loss on held-out data"
DESCRIPTION = f"{HELP}; the processes of `accelerate launch` take runs of their own"
LAUNCHED = True

# Sections whose settings can be tried: those that a held-out loss can choose between.
_TRIED = ("training", "selection", "scoring", "peft")
_OWN_OPTIONS = {"seed": "--seeds", "selection.seed": "--seeds", "training.max_steps": "--steps"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    group = parser.add_argument_group("what is tried")
    group.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="A.B=V,V",
        help="a setting and values to try, such as training.learning_rate=1e-3,2e-3; may be given again: all "
        "combinations are tried",
    )
    group.add_argument(
        "--weights",
        type=pair,
        action="append",
        metavar="ALPHA,BETA",
        help="to try; may be given again (default without --grid: the paper's 1,0 0,1 5,5 7,3 3,7)",
    )
    group.add_argument("--ratios", metavar="R,R", help="shares of the tokens to try (default: the preset's)")
    group.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each (default: %(default)s)")
    group.add_argument("--steps", type=positive, default=50, metavar="N", help="of each run (default: %(default)s)")
    group = parser.add_argument_group("what decides")
    group.add_argument(
        "--hold-out",
        type=positive,
        default=100,
        metavar="N",
        help="training examples that decide, if there is no eval_data (default: %(default)s)",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="NATS",
        help="choose the smallest r whose loss is above the least by this at most (default: %(default)s)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--write", type=Path, metavar="FILE", help="the preset (default: tune/preset.yaml of the run)")


def check(args: argparse.Namespace) -> RunConfig:
    """The configuration, with which every combination of the grid is accepted.

    Raises:
        UserError: a share, a setting or a value that is not.
    """
    config = configuration(args)
    if args.ratios:
        split_ratios(args.ratios)
    grid = read_grid(args.grid)
    for values in itertools.product(*grid.values()):
        override_config(config, dict(zip(grid, values, strict=True)), "--grid")
    return config


def run(args: argparse.Namespace, config: RunConfig) -> None:
    """Run every combination, print the table, and write the best as a preset."""
    from tokenseek.sweeps.tune import Grid, tune  # late: needs torch

    grid = Grid(
        weights=args.weights or (),
        ratios=split_ratios(args.ratios) if args.ratios else (),
        settings=read_grid(args.grid),
        seeds=args.seeds,
        steps=args.steps,
        hold_out=args.hold_out,
        tolerance=args.tolerance,
    )
    tune(config, grid, args.write)


def read_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """The values of `training.learning_rate=1e-3,2e-3`, by dotted path; values are YAML.

    Raises:
        UserError: for words of another form, or a setting that is not to be tried.
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        values = parse_yaml(f"[{text}]", f"--grid {name}") if equals else []
        if not values or None in values:
            raise UserError(f"--grid {word}: write SETTING=VALUE,VALUE, such as training.learning_rate=1e-3,2e-3")
        if name in grid:
            raise UserError(f"--grid {name} is given twice; write all its values in one, with commas between")
        if option := _OWN_OPTIONS.get(name):
            raise UserError(f"--grid {name}: set by {option}")
        if name.partition(".")[0] not in _TRIED or "." not in name:
            raise UserError(
                f"--grid {name}: settings of {', '.join(_TRIED)} can be tried, such as training.learning_rate; losses "
                "under other data or of other models say nothing about each other"
            )
        grid[name] = values
    return grid
