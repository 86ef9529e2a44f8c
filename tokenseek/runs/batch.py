"""`training.per_device_train_batch_size: auto`: the largest micro batch whose training step fits into memory."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from tokenseek.config import RunConfig, load_config
from tokenseek.config.sizes import format_size
from tokenseek.errors import UserError
from tokenseek.launching.processes import first_on_main, log_once
from tokenseek.planning import Engine, launched_engine, load_model_config, method_of, plan_memory
from tokenseek.runs.ratio import memory_budget

_log = logging.getLogger(__name__)


def settle_batch(config: RunConfig, settled_by: str | None, tokens: int, state: PartialState) -> RunConfig:
    """`config` with a number for `training.per_device_train_batch_size`; as it is where that is a number already.

    A step keeps its examples: `gradient_accumulation_steps` says how many of them are each process's, and is divided by
    the size that is taken, a divisor of it. A run that goes on keeps its size, if it divides them too. Otherwise the
    main process plans the step on tensors without data, for the process that has least memory.

    Args:
        settled_by: a checkpoint, or another folder beside the `config.yaml` of the run that is gone on with.
        tokens: of the longest row.

    Raises:
        UserError: in every process; not even one row fits, with what it needs.
    """
    if config.training.per_device_train_batch_size != "auto":
        return config
    rows = config.training.gradient_accumulation_steps
    if before := _size_of_run(settled_by, rows):
        size, told = before, f"as before in {settled_by}"
    elif rows == 1:
        size, told = 1, "a step has one row on each process (training.gradient_accumulation_steps)"
    else:
        budget = memory_budget(config, state)
        engine = launched_engine(on_cpu=state.device.type == "cpu")
        planned = first_on_main(
            state, lambda: largest_batch(config, budget, engine, tokens) if state.is_main_process else None
        )
        ((size, peak),) = broadcast_object_list([planned])
        told = f"the largest that fits into {format_size(budget)} with {tokens:,} tokens; planned {format_size(peak)}"
    log_once(
        _log,
        state,
        f"training.per_device_train_batch_size: auto: {size} x {rows // size} micro batches a step on each process; "
        f"{told}.",
    )
    return with_batch(config, size)


def with_batch(config: RunConfig, size: int) -> RunConfig:
    """`config`, whose batch size is `auto`, with micro batches of `size` rows and as many rows in a step."""
    settings: dict[str, int | None] = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": config.training.gradient_accumulation_steps // size,
    }
    if config.selection.ratio != "auto":
        settings["memory_budget"] = None  # which is for what was `auto`
    return config.model_copy(update={"training": config.training.model_copy(update=settings)})


def largest_batch(config: RunConfig, budget: int, engine: Engine, tokens: int) -> tuple[int, int]:
    """The largest divisor of a step's rows whose micro batch stays within `budget` bytes, and its planned peak.

    Memory is almost linear in the rows, and a plan takes seconds: the line through one row and two says where to look.
    """
    rows, model_config = config.training.gradient_accumulation_steps, load_model_config(config)
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    known: dict[int, int] = {}

    def peak(size: int) -> int:
        if size not in known:
            of_size = with_batch(config, size)
            known[size] = plan_memory(
                of_size, method_of(of_size), engine, tokens=tokens, model_config=model_config
            ).peak
        return known[size]

    if peak(1) > budget:
        raise UserError(
            f"training.per_device_train_batch_size: auto: one row of {tokens:,} tokens needs {format_size(peak(1))}, "
            f"and {format_size(budget)} may be taken. Lower selection.ratio or data.max_length, or set "
            "training.recompute=true; `tokenseek plan --budget SIZE` with a batch size of 1 tells what else would help."
        )
    second = divisors[1]
    if peak(second) > budget:
        return 1, peak(1)
    per_row = max(1, (peak(second) - peak(1)) / (second - 1))
    guess = max(size for size in divisors if size == second or peak(1) + per_row * (size - 1) <= budget)
    while peak(guess) > budget:
        guess = divisors[divisors.index(guess) - 1]
    return guess, peak(guess)


def _size_of_run(settled_by: str | None, rows: int) -> int | None:
    """The micro batch of the run that is gone on with; None where it is unknown, or no divisor of `rows`."""
    file = Path(settled_by).parent / "config.yaml" if settled_by else None
    if file is None or not file.is_file():
        return None
    size = load_config(file).training.per_device_train_batch_size
    return size if isinstance(size, int) and rows % size == 0 else None
