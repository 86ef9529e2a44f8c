"""Warnings of libraries that a user of a command can do nothing about."""

from __future__ import annotations

import warnings

# By the library that causes them: its category and how its message begins.
_MESSAGES: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),  # PEFT asks Transformers for it
    (DeprecationWarning, r"`torch\.jit\.script_method` is deprecated"),  # torch's own modules use it
)


def hide_known_warnings() -> None:
    """Let these messages, and no others, not reach the terminal; for commands, which own their process."""
    for category, message in _MESSAGES:
        warnings.filterwarnings("ignore", message, category)
