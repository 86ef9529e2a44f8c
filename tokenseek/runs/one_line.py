"""A fine-tuning from Python, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenseek.config import OneLine, load_one_line
from tokenseek.config.one_line import DEFAULT_METHOD
from tokenseek.launching.environment import trains_on_cpu
from tokenseek.runs.summary import TrainingSummary
from tokenseek.runs.train import train


def finetune(
    model: str | Path,
    data: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    output: str | Path | None = None,
    ratio: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainingSummary:
    """Fine-tune a model on data, as `tokenseek train --model M --data D` does, in this process.

    Args:
        model: a folder, or a name on the hub.
        data: a file, a folder or a data set of the hub; its format is recognised.
        method: `full`, `lora`, `qlora`, `loha`, ...; :func:`tokenseek.config.list_methods` lists them.
        output: the run's folder; `runs/<model>-<data>` if None.
        ratio: the share of the tokens that is trained; 0.1 if None.
        settings: any others, by their dotted paths (`{"training.num_train_epochs": 3}`).

    Returns:
        What the run did; `final` is the folder of the trained model or adapter.

    Raises:
        UserError: for a method, model, data or settings that do not fit, before the model is loaded.
    """
    words = OneLine(str(model), str(data), method, None if output is None else str(output), ratio)
    return train(load_one_line(words, settings=settings, on_cpu=trains_on_cpu), outlined=True)
