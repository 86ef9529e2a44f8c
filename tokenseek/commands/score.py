"""`tokenseek score`."""

from __future__ import annotations

import argparse

from tokenseek.commands.arguments import add_config_arguments, configuration, part, require_columns
from tokenseek.config import RunConfig

HELP = "score every token of a data set and write its index"
DESCRIPTION = f"{HELP}; starts `accelerate launch` underneath"
LAUNCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    group = parser.add_argument_group("array jobs")
    group.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="score part I (from 0) of N alone, for array jobs; then `tokenseek merge`",
    )


def check(args: argparse.Namespace) -> RunConfig:
    """The configuration of the run.

    Raises:
        UserError: a setting that is not accepted, or a column that the data lack.
    """
    config = configuration(args)
    require_columns(config)
    return config


def run(args: argparse.Namespace, config: RunConfig) -> None:
    """Score the data of the configuration, or one part of it."""
    from tokenseek.runs.score import score  # late: a mistake in the configuration is reported before torch is imported

    score(config, part=args.part)
