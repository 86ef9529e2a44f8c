"""What the package logs, on the terminal of a command: as it is, warnings and errors on stderr."""

from __future__ import annotations

import logging
import sys


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


_TERMINAL = _Terminal()


def log_to_terminal() -> None:
    """Print the records of this package from level INFO on; what library users configure is left alone."""
    logger = logging.getLogger("tokenseek")
    logger.setLevel(logging.INFO)
    logger.addHandler(_TERMINAL)  # once, however often this is called
