"""`tokenseek train`."""

from __future__ import annotations

import argparse

from tokenseek.commands.arguments import add_config_arguments, configuration
from tokenseek.config import RunConfig

HELP = "fine-tune on selected tokens (scores first where there is no index)"
DESCRIPTION = f"{HELP}; starts `accelerate launch` underneath"
LAUNCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def check(args: argparse.Namespace) -> RunConfig:
    return configuration(args)


def run(args: argparse.Namespace, config: RunConfig) -> None:
    from tokenseek.runs.train import train  # late: a mistake in the configuration is told before torch is imported

    train(config)
