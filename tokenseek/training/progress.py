"""A run's progress in the terminal: one line for each log."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenseek.config.sizes import format_size
from tokenseek.launching.memory import peak_memory_bytes

_log = logging.getLogger(__name__)


class ProgressLine(TrainerCallback):
    """Logs step, losses, tokens per second since the last line, peak memory and the time that is left."""

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._first_step = self._last_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count time, steps and tokens."""
        self._began = self._last = time.perf_counter()
        self._first_step, self._last_tokens = state.global_step, state.num_input_tokens_seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the step, the loss and the pace."""
        if not state.is_world_process_zero or not logs:
            return
        for name in ("held_out_loss", "eval_loss"):
            if name in logs:
                _log.info(f"step {state.global_step:,}  held-out loss {logs[name]:.4f}")
        if "loss" not in logs:
            return
        now, tokens = time.perf_counter(), state.num_input_tokens_seen
        parts = [f"step {state.global_step:,}/{state.max_steps:,}"]
        parts += [f"{name} {logs[name]:.4f}" for name in ("loss", "loss_all") if name in logs]
        parts += [
            f"{(tokens - self._last_tokens) / (now - self._last):,.0f} tokens/s",
            f"{format_size(peak_memory_bytes())} {'allocated' if torch.cuda.is_available() else 'resident'}",
        ]
        done = state.global_step - self._first_step
        if done and (left := state.max_steps - state.global_step) > 0:
            parts.append(f"{format_seconds((now - self._began) / done * left)} left")
        _log.info("  ".join(parts))
        self._last, self._last_tokens = now, tokens


def format_seconds(seconds: float) -> str:
    """
    Example:
        >>> format_seconds(3700)
        '1 h 02 min'
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
