"""`selection.ratio: auto` of runs with an index: the largest share of the tokens whose step fits into memory."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tokenseek.config import RunConfig, load_config
from tokenseek.config.sizes import format_size, parse_size
from tokenseek.errors import UserError
from tokenseek.launching.memory import free_memory_bytes
from tokenseek.launching.processes import first_on_main, log_once
from tokenseek.planning import Engine, describe_choice, largest_ratio, launched_engine

_log = logging.getLogger(__name__)

# What the plan does not know of: gaps in the allocator, memory inside kernels.
SHARE_OF_FREE_MEMORY = 0.9


def settle_ratio(config: RunConfig, checkpoint: str | None, tokens: int, state: PartialState) -> RunConfig:
    """`config` with a number for `selection.ratio`; as it is where that is a number already.

    A run that resumes continues with the share of its checkpoint's run. Otherwise the main process plans the step on
    tensors without data, for the process that has least memory.

    Args:
        checkpoint: that the run resumes from, if any.
        tokens: of the longest example.

    Raises:
        UserError: in every process; nothing fits, with what would help, or the checkpoint's run has no share.
    """
    if config.selection.ratio != "auto":
        return config
    if checkpoint:
        ratio, told = ratio_of_run(Path(checkpoint).parent), f"r = {{}} as before in {checkpoint}"
    else:
        budget = memory_budget(config, state)
        # One process plans and broadcasts; its errors are raised in every process.
        engine = launched_engine(on_cpu=state.device.type == "cpu")
        planned = first_on_main(
            state, lambda: _planned(config, budget, engine, tokens) if state.is_main_process else None
        )
        (planned,) = broadcast_object_list([planned])
        ratio, peak = planned
        told = f"r = {{}} is the largest share that fits into {format_size(budget)}; planned peak {format_size(peak)}"
    log_once(_log, state, f"selection.ratio: auto: {told.format(f'{ratio:g}')}.")
    selection = config.selection.model_copy(update={"ratio": ratio})
    training = config.training.model_copy(update={"memory_budget": None})
    return config.model_copy(update={"selection": selection, "training": training})


def _planned(config: RunConfig, budget: int, engine: Engine, tokens: int) -> tuple[float, int]:
    """The largest ratio and its peak in bytes."""
    choice = largest_ratio(config, budget, engine, tokens=tokens)
    if choice.ratio is None:
        raise UserError(f"selection.ratio: auto: in {describe_choice(choice, budget)}")
    return choice.ratio, choice.plan.peak


def memory_budget(config: RunConfig, state: PartialState) -> int:
    """Bytes that a step may take: `training.memory_budget`, or nine tenths of what is free for every process."""
    if config.training.memory_budget:
        return parse_size(config.training.memory_budget)
    return int(SHARE_OF_FREE_MEMORY * min(gather_object([free_memory_bytes(state)])))


def describe_budget(config: RunConfig, budget: int) -> str:
    given = config.training.memory_budget
    return f"{format_size(budget)} ({'training.memory_budget' if given else 'nine tenths of what is free'})"


def ratio_of_run(folder: Path) -> float:
    """The share that the run in `folder` was trained with.

    Raises:
        UserError: its `config.yaml` holds none.
    """
    file = folder / "config.yaml"
    ratio = load_config(file).selection.ratio if file.is_file() else None
    if not isinstance(ratio, float):
        raise UserError(
            f"selection.ratio is auto, and {file}, which would give the share that the run of this checkpoint was "
            "trained with, holds none. Give it: --set selection.ratio=0.1."
        )
    return ratio
