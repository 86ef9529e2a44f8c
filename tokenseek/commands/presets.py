"""`tokenseek presets`."""

from __future__ import annotations

import argparse
import re
from itertools import takewhile

from tokenseek.config.resources import find_resource, list_resources

HELP = "list the shipped presets"
DESCRIPTION = HELP
LAUNCHED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--names", action="store_true", help="the names alone, for scripts")


def check(args: argparse.Namespace) -> None:
    """There is nothing to refuse."""


def run(args: argparse.Namespace, checked: None) -> None:
    """Print the names of the shipped presets, each with what it is."""
    names = list_resources("preset")
    width = max(map(len, names))
    for name in names:
        print(name if args.names else f"{name:<{width}}  {description(name)}")


def description(name: str) -> str:
    """The first sentence of the comment that a shipped preset opens with."""
    lines = find_resource("preset", name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.) ", comment)[0].removesuffix(".")
