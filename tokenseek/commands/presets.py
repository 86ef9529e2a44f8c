"""`tokenseek presets`."""

from __future__ import annotations

import argparse

from tokenseek.config.resources import list_resources

HELP = "list the shipped presets"
DESCRIPTION = HELP
LAUNCHED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def check(args: argparse.Namespace) -> None:
    """There is nothing to refuse."""


def run(args: argparse.Namespace, checked: None) -> None:
    """Print the names of the shipped presets."""
    print("\n".join(list_resources("preset")))
