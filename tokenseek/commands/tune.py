"""`tokenseek tune`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenseek.commands.arguments import add_config_arguments, configuration, pair, positive, split_ratios
from tokenseek.config import RunConfig

HELP = "choose alpha, beta and r by the loss on held-out data"
DESCRIPTION = f"{HELP}; the processes of `accelerate launch` take runs of their own"
LAUNCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    group = parser.add_argument_group("what is tried")
    group.add_argument(
        "--weights",
        type=pair,
        action="append",
        metavar="ALPHA,BETA",
        help="to try; may be given again (default: the paper's 1,0 0,1 5,5 7,3 3,7)",
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
        help="training examples that decide, where there is no eval_data (default: %(default)s)",
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
    config = configuration(args)
    if args.ratios:
        split_ratios(args.ratios)
    return config


def run(args: argparse.Namespace, config: RunConfig) -> None:
    from tokenseek.sweeps.tune import PAPER_WEIGHTS, Grid, tune  # late: needs torch

    grid = Grid(
        weights=args.weights or PAPER_WEIGHTS,
        ratios=split_ratios(args.ratios) if args.ratios else (),
        seeds=args.seeds,
        steps=args.steps,
        hold_out=args.hold_out,
        tolerance=args.tolerance,
    )
    tune(config, grid, args.write)
