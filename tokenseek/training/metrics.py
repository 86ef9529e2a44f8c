"""What a run reports: one line of JSON per log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenseek.launching.memory import peak_memory_bytes, reset_peak_memory
from tokenseek.training.checkpoints import writing


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to a JSONL file, with the step, the seconds of training and the peak memory.

    A resumed run continues in the same file, after the step of its checkpoint: what the interrupted run logged later is
    dropped, since those steps are taken again. A run that is not resumed begins a new file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut off lines of steps that will be made once more, and begin to count memory and time."""
        self.started = time.perf_counter()
        reset_peak_memory()
        if state.is_world_process_zero and self.path.exists():
            self.path.write_text("".join(self._lines_up_to(state.global_step)), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line, on the main process."""
        if state.is_world_process_zero:
            self.write(state.global_step, logs or {})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line; the main process alone does."""
        seconds = round(time.perf_counter() - self.started, 3)
        line = {"step": step, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes(), **values}
        with writing(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _lines_up_to(self, last_step: int) -> Iterator[str]:
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            # A process that is killed may leave half a line, which is the last one then.
            if last_step == 0 or not line.endswith("\n") or json.loads(line)["step"] > last_step:
                return
            yield line
