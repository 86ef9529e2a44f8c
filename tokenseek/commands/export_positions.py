"""`tokenseek export-positions`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenseek.commands.arguments import add_config_arguments
from tokenseek.config import RunConfig, load_config
from tokenseek.errors import UserError

HELP = "write the selected positions of an index, one bit per token"
DESCRIPTION = HELP
LAUNCHED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    group = parser.add_argument_group("positions")
    group.add_argument("--ratio", type=float, metavar="R", help="share of the tokens (default: selection.ratio)")
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="a NumPy archive (default: positions.npz in the run's output_dir)"
    )


def check(args: argparse.Namespace) -> RunConfig:
    """The configuration, with the ratio that was given.

    Raises:
        UserError: its rule draws again in every epoch, the ratio is not accepted, or the file cannot be written there.
    """
    ratio = [] if args.ratio is None else [f"selection.ratio={args.ratio}"]
    config = load_config(args.preset, [*args.set, *ratio])
    rule = config.selection.to_rule()
    reads = rule.definition.reads
    if "seed" in reads:
        raise UserError(
            f"rule {rule.rule!r} draws again in every epoch, so no selection is settled before training; "
            "export-positions accepts rules without draws, such as --set selection.rule=top."
        )
    if ratio and "ratio" not in reads:
        raise UserError(f"--ratio {args.ratio}: rule {rule.rule!r} does not depend on a ratio; leave --ratio out.")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}; make it first.")
    if args.output and args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; give a file, such as {args.output / 'positions.npz'}.")
    return config


def run(args: argparse.Namespace, config: RunConfig) -> None:
    """Write the archive of positions."""
    from tokenseek.runs.positions import export_positions  # late: mistakes are reported before torch is imported

    export_positions(config, args.output)
