"""Warnings of libraries that a user of a command can do nothing about."""

from __future__ import annotations

import logging
import warnings

# By the library that causes them: its category and how its message begins.
_MESSAGES: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),  # PEFT asks Transformers for it
    (DeprecationWarning, r"`torch\.jit\.script_method` is deprecated"),  # torch's own modules use it
)
# The same of what libraries log: the logger and how its message begins.
_LOGGED: tuple[tuple[str, str], ...] = (
    # PEFT imports bitsandbytes wherever it is installed, which then looks for a faster kernel for 4-bit CPU models.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
)


def hide_known_warnings() -> None:
    """Let these messages, and no others, not reach the terminal; for commands, which own their process."""
    for category, message in _MESSAGES:
        warnings.filterwarnings("ignore", message, category)
    for logger, beginning in _LOGGED:
        logging.getLogger(logger).addFilter(_Other(beginning))


class _Other(logging.Filter):
    """Passes every message that does not begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginning)
