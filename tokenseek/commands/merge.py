"""`tokenseek merge`."""

from __future__ import annotations

import argparse

from tokenseek.commands.arguments import add_config_arguments, configuration
from tokenseek.config import RunConfig

HELP = "merge the shards of parts that separate jobs have scored (`score --part`)"
DESCRIPTION = HELP
LAUNCHED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def check(args: argparse.Namespace) -> RunConfig:
    """The configuration, which says where the index is."""
    return configuration(args)


def run(args: argparse.Namespace, config: RunConfig) -> None:
    """Merge the parts of an index into one file, and print its size."""
    from tokenseek.runs.score import merge  # late: needs torch

    path = config.index_path
    header = merge(path)
    print(f"{path}: {header.num_examples:,} examples, {header.num_tokens:,} tokens")
