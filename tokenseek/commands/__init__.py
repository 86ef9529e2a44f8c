"""The commands of ``tokenseek``, one file each; :mod:`tokenseek.cli` is the table of them.

A file says what a command is (`HELP`, `DESCRIPTION`, and `LAUNCHED` where the processes of `accelerate launch` run it)
and has

- ``add_arguments(parser)``: every flag, written here and nowhere else;
- ``check(args)``: refuses what can be refused before any process starts and before torch is imported; returns what
  ``run`` needs, such as the configuration;
- ``run(args, checked)``: the command. Every process of a launched command calls ``check`` and ``run``, with the words
  that the user gave.

A new command is a file here and a line in :data:`tokenseek.cli.COMMANDS`.
"""

from __future__ import annotations

import argparse
from typing import Any, Protocol


class Command(Protocol):
    """What a file of this package has."""

    HELP: str
    DESCRIPTION: str
    LAUNCHED: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Every flag of the command, in groups."""

    def check(self, args: argparse.Namespace) -> Any:
        """What ``run`` needs, such as the configuration; neither processes nor torch are there yet.

        Raises:
            UserError: the words do not fit each other, or the configuration.
        """

    def run(self, args: argparse.Namespace, checked: Any) -> int | None:
        """The command, with what ``check`` returned; returns the exit status where that is not 0."""
