"""`tokenseek data`."""

from __future__ import annotations

import argparse
import sys
from typing import Literal, NamedTuple

from tokenseek.commands.arguments import add_config_arguments, add_model_and_data_arguments, configuration, positive
from tokenseek.config import DataConfig, ModelConfig, load_data_of_model
from tokenseek.errors import UserError

HELP = "show training data as tokens with their labels, without a model's weights"
DESCRIPTION = (
    "show what a model would be trained on: the format that is recognised, how many tokens carry a loss, and the first "
    "examples as tokens with their labels in colour; reads the tokenizer and not the weights"
)
LAUNCHED = False


class Shown(NamedTuple):
    """What is shown: whose tokenizer, of what data, for a run that packs or not (`training.packing`)."""

    model: ModelConfig
    data: DataConfig
    packing: bool | Literal["bins"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_and_data_arguments(parser)
    add_config_arguments(parser)
    group = parser.add_argument_group("examples")
    group.add_argument(
        "--examples", type=positive, default=3, metavar="N", help="how many to show (default: %(default)s)"
    )
    group.add_argument("--no-color", action="store_true", help="mark with brackets instead of colours")


def check(args: argparse.Namespace) -> Shown:
    """The sections `model` and `data`, from two names or from a preset, and how the run packs.

    Raises:
        UserError: neither is given whole, or both are.
    """
    if args.model and args.data and not args.preset:
        sections = load_data_of_model(args.model, args.data, args.set)
        return Shown(sections.model, sections.data, packing=False)  # as `tokenseek train` of these words
    if args.preset and not args.model and not args.data:
        config = configuration(args)
        return Shown(config.model, config.data, config.training.packing)
    raise UserError("give --model and --data, or a --preset that names both; --set changes a setting of either.")


def run(args: argparse.Namespace, shown: Shown) -> None:
    """Print the lines of :func:`tokenseek.runs.data.show_data`."""
    from tokenseek.runs.data import show_data  # late: mistakes are reported before transformers is imported

    color = sys.stdout.isatty() and not args.no_color
    for line in show_data(shown.model, shown.data, args.examples, packing=shown.packing, color=color):
        print(line)
