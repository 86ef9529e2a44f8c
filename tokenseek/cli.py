"""The ``tokenseek`` command: a table of the commands in :mod:`tokenseek.commands`, and how one is run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from tokenseek.commands import (
    Command,
    chat,
    data,
    evaluate,
    export_positions,
    merge,
    merge_adapter,
    plan,
    presets,
    reproduce,
    score,
    show,
    train,
    tune,
)
from tokenseek.commands.arguments import add_launch_arguments, without_launch_arguments
from tokenseek.commands.terminal import log_to_terminal
from tokenseek.errors import USAGE_ERROR, UserError
from tokenseek.launching.launcher import launch_script
from tokenseek.quiet import hide_known_warnings
from tokenseek.spelling import nearest
from tokenseek.versions import tell_of_untested

COMMANDS: dict[str, Command] = {
    "score": score,
    "train": train,
    "tune": tune,
    "reproduce": reproduce,
    "merge": merge,
    "plan": plan,
    "data": data,
    "show": show,
    "export-positions": export_positions,
    "evaluate": evaluate,
    "chat": chat,
    "merge-adapter": merge_adapter,
    "presets": presets,
}
# Non-main ranks wait this long so that rank 0 can report the error first; the launcher ends them as soon as it has.
_SECONDS_TO_MAIN_PROCESS = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tokenseek", description="Fine-tune language models on the tokens that matter."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        options = commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(options)
        if command.LAUNCHED:
            add_launch_arguments(options)
    words = sys.argv[1:] if argv is None else list(argv)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse_unknown(commands.choices[args.command], unknown)
    tell_of_untested(lambda warning: print(f"tokenseek: warning: {warning}", file=sys.stderr))
    return guarded(lambda: _run(args, words[1:]))


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """End with the usage of a command, the words that it does not take, and the options that were probably meant."""
    accepted = [option for option in parser._option_string_actions if option.startswith("--")]
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    meant = dict.fromkeys(near for flag in flags if (near := nearest(flag, accepted)))
    suggestion = f"; did you mean {', '.join(meant)}?" if meant else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int | None:
    command = COMMANDS[args.command]
    checked = command.check(args)
    if not command.LAUNCHED or args.here:
        return command.run(args, checked)
    words = without_launch_arguments(words)
    return launch_script(args.command, words, args.accelerate_config, args.num_processes)


def run_script(name: str) -> int:
    """What ``launch/NAME.py`` does in every process: the same command, in this process."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"accelerate launch launch/{name}.py", description=f"tokenseek {name}, inside `accelerate launch`"
    )
    command.add_arguments(parser)
    args = parser.parse_args()

    def run() -> int | None:
        from tokenseek.launching.processes import leave_group  # late: it needs torch

        status = command.run(args, command.check(args))
        leave_group()
        return status

    return guarded(run)


def guarded(run: Callable[[], int | None]) -> int:
    """Run, with what is logged on the terminal; a :class:`UserError` becomes its message and exit status 2."""
    log_to_terminal()
    hide_known_warnings()
    try:
        return run() or 0
    except UserError as error:
        # Nearly every rank raises the same error, so one message is enough. If this process ended first, the launcher
        # might end the main one before it has reported; an error that the main one does not raise is reported here.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_SECONDS_TO_MAIN_PROCESS)
        print(f"tokenseek: error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
