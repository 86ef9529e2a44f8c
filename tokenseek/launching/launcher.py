"""Starts a script of ``launch/`` in the processes of `accelerate launch`, and keeps their exit status."""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Sequence

from tokenseek.config.resources import find_resource, resolve_accelerate_config
from tokenseek.errors import USAGE_ERROR

_log = logging.getLogger(__name__)


def launch_script(
    name: str, words: Sequence[str], accelerate_config: str = "single", num_processes: int | None = None
) -> int:
    """Run ``launch/NAME.py`` with these words in every process of an accelerate config; returns the exit status.

    Raises:
        UserError: there is no such accelerate config.
    """
    command = ["--config_file", str(resolve_accelerate_config(accelerate_config))]
    if num_processes:
        command += ["--num_processes", str(num_processes)]
    return accelerate_launch([*command, str(find_resource("launch script", name)), *words])


def accelerate_launch(words: Sequence[str]) -> int:
    """`accelerate launch` in this process, which keeps the exit status of the launched ones; the command loses it."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(list(words)))
    except subprocess.CalledProcessError as error:  # of a single process
        statuses = [error.returncode]
    except ChildFailedError as error:
        statuses = [failure.exitcode for failure in error.failures.values()]
    else:
        return 0
    if USAGE_ERROR in statuses:
        return USAGE_ERROR  # the others were ended because of it
    if killed := [-status for status in statuses if status < 0]:
        _log.error("tokenseek: error: a process was ended by signal %d (%s).", killed[0], _signal(killed[0]))
        return 128 + killed[0]
    return statuses[0]


def _signal(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name}; out of memory?" if number == signal.SIGKILL else name
