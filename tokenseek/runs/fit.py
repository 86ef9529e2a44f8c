"""`auto`: the micro batch, recomputation and, of steps that select their own tokens, the share that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from tokenseek.config import RunConfig, load_config
from tokenseek.config.sizes import format_size
from tokenseek.errors import UserError, first_line
from tokenseek.launching.processes import first_on_main, log_once
from tokenseek.planning import (
    Engine,
    MemoryPlan,
    describe_choice,
    largest_ratio,
    launched_engine,
    load_model_config,
    method_of,
    plan_memory,
)
from tokenseek.runs.ratio import describe_budget, memory_budget, ratio_of_run
from tokenseek.selection import rule_named

_log = logging.getLogger(__name__)

_BATCH, _RECOMPUTE, _RATIO = "training.per_device_train_batch_size", "training.recompute", "selection.ratio"


def settle_memory(
    config: RunConfig, settled_by: str | None, tokens: int, state: PartialState
) -> tuple[RunConfig, MemoryPlan | None]:
    """`config` without `auto`, and the plan of its step where one was made (in the main process).

    A step keeps its examples: `gradient_accumulation_steps` says how many of them are each process's, and is divided by
    the micro batch, the largest that fits. What does not fit with one row is recomputed, and what does not fit then
    either takes fewer tokens. A run that goes on keeps what it had. `selection.ratio` of runs with an index is
    :func:`tokenseek.runs.ratio.settle_ratio`'s.

    Where nobody said how much memory there is to be (`training.memory_budget`), a model that cannot be planned is
    trained with one row, as other tools would, and the log says why.

    Args:
        settled_by: a checkpoint, or another folder beside the `config.yaml` of the run that is gone on with.
        tokens: of the longest row.

    Raises:
        UserError: in every process; nothing fits, with what would help, or the checkpoint's run has no share.
    """
    auto = _autos(config)
    if not auto:
        return config, None
    config = _as_before(config, settled_by)
    if not (left := _autos(config)):
        log_once(_log, state, f"auto: {_told(config, auto)}, as before in {settled_by}.")
        return _settled(config), None
    if left == [_BATCH] and config.training.gradient_accumulation_steps == 1:
        log_once(_log, state, f"auto: {_BATCH}=1; a step has one row on each process.")
        return _settled(with_batch(config, 1)), None
    budget = memory_budget(config, state)
    engine = launched_engine(on_cpu=state.device.type == "cpu")
    chosen = first_on_main(state, lambda: _choose(config, budget, engine, tokens) if state.is_main_process else None)
    plan = chosen[1] if chosen else None
    (sent,) = broadcast_object_list([chosen and (chosen[0], chosen[2])])
    config, why = sent
    log_once(_log, state, f"auto: {_told(config, auto)}. {why}")
    return _settled(config), plan


def with_batch(config: RunConfig, size: int) -> RunConfig:
    """`config`, whose batch size is `auto`, with micro batches of `size` rows and as many rows in a step."""
    steps = config.training.gradient_accumulation_steps // size
    return _with(config, "training", per_device_train_batch_size=size, gradient_accumulation_steps=steps)


class Unplanned(Exception):
    """The model's step cannot be planned; the message says why."""


class Planner:
    """Plans of a run's steps, each made once, since one takes seconds.

    Args:
        config: whose batch size may be `auto`.
        budget: bytes that a step may take.
        tokens: of a row.
    """

    def __init__(self, config: RunConfig, budget: int, engine: Engine, tokens: int) -> None:
        self.config, self.budget, self.engine, self.tokens = config, budget, engine, tokens
        training = config.training
        rows, is_auto = training.gradient_accumulation_steps, training.per_device_train_batch_size == "auto"
        self.sizes = [n for n in range(1, rows + 1) if rows % n == 0] if is_auto else [training.micro_batch]
        self.model_config = load_model_config(config)
        self._plans: dict[tuple[int, float | None, bool], MemoryPlan] = {}

    def of(self, size: int, ratio: float | None, recompute: bool) -> MemoryPlan:
        """
        Raises:
            Unplanned: whatever came in between.
        """
        key = (size, ratio, recompute)
        if key not in self._plans:
            config = self.configured(*key)
            try:
                self._plans[key] = plan_memory(
                    config, method_of(config), self.engine, tokens=self.tokens, model_config=self.model_config
                )
            except Exception as error:  # whatever a model's code does with tensors that hold no numbers
                raise Unplanned(first_line(error)) from error
        return self._plans[key]

    def configured(self, size: int, ratio: float | None, recompute: bool) -> RunConfig:
        config = _with(self.config, "training", recompute=recompute)
        if ratio is not None:
            config = _with(config, "selection", ratio=ratio)
        return with_batch(config, size) if self.config.training.per_device_train_batch_size == "auto" else config

    def fits(self, size: int, ratio: float | None, recompute: bool) -> bool:
        return self.of(size, ratio, recompute).peak <= self.budget

    def largest_batch(self, ratio: float | None, recompute: bool) -> int | None:
        """The largest micro batch that fits; None where one row does not.

        Most often all rows fit, which is asked first. Else memory is almost linear in the rows, or bends upwards: the
        line between one and all of them says where to look.
        """
        sizes, way = self.sizes, (ratio, recompute)
        if self.fits(sizes[-1], *way):
            return sizes[-1]
        if not self.fits(sizes[0], *way):
            return None
        least, most = self.of(sizes[0], *way).peak, self.of(sizes[-1], *way).peak
        slope = (most - least) / (sizes[-1] - sizes[0])
        at = max(i for i, size in enumerate(sizes[:-1]) if i == 0 or least + slope * (size - sizes[0]) <= self.budget)
        while not self.fits(sizes[at], *way):
            at -= 1
        while at + 2 < len(sizes) and self.fits(sizes[at + 1], *way):
            at += 1
        return sizes[at]


def _choose(config: RunConfig, budget: int, engine: Engine, tokens: int) -> tuple[RunConfig, MemoryPlan | None, str]:
    """What was `auto` as values, its plan, and why it is that."""
    # What was measured (docs/evidence.md), and no more for having memory.
    ratio = rule_named(config.selection.rule).defaults["ratio"] if config.selection.ratio == "auto" else None
    is_auto = config.training.recompute == "auto"
    ways = [False, True] if is_auto else [config.training.recompute is True]
    try:
        planner = Planner(config, budget, engine, tokens)
        for recompute in ways:
            size = planner.largest_batch(ratio, recompute)
            if size is not None:
                break
        else:
            return _smaller(planner, ratio, ways)
        plan = planner.of(size, ratio, recompute)
        return (
            planner.configured(size, ratio, recompute),
            plan,
            _why(planner, plan, ratio, ways[: ways.index(recompute)]),
        )
    except Unplanned as error:
        if config.training.memory_budget:
            raise UserError(
                f"training.memory_budget: {config.training.memory_budget} cannot be kept to, since a step of this "
                f"model cannot be planned: {error}. Leave it out, and give numbers for what is auto "
                f"({', '.join(_autos(config))})."
            ) from error
        smallest = planner.configured(planner.sizes[0], ratio, ways[0])
        return smallest, None, f"The memory of a step cannot be planned ({error})."


def _smaller(planner: Planner, ratio: float | None, ways: Sequence[bool]) -> tuple[RunConfig, MemoryPlan | None, str]:
    """Where not even one row of the usual share fits."""
    config, budget, size, recompute = planner.config, planner.budget, planner.sizes[0], ways[-1]
    if ratio is not None:
        least = planner.configured(size, ratio, recompute)
        options: dict[str, Any] = dict(tokens=planner.tokens, model_config=planner.model_config, most=ratio)
        choice = largest_ratio(least, budget, planner.engine, **options)
        if choice.ratio is None:
            raise UserError(
                f"{_RATIO}: auto: in {describe_choice(choice, budget)}\n  To try all the same, give numbers: "
                f"--set {_RATIO}=0.1 --set {_BATCH}=1 --set {_RECOMPUTE}=true"
            )
        why = _why(planner, choice.plan, ratio, ways)
        return planner.configured(size, choice.ratio, recompute), choice.plan, why
    plan = planner.of(size, ratio, recompute)
    if config.training.per_device_train_batch_size == "auto":
        recomputed = "" if recompute else ", or set training.recompute=true"
        raise UserError(
            f"{_BATCH}: auto: one row of {planner.tokens:,} tokens needs {format_size(plan.peak)}, and "
            f"{describe_budget(config, budget)} may be used. Lower selection.ratio or data.max_length{recomputed}; "
            "`tokenseek plan --budget SIZE` with a batch size of 1 tells what else would help."
        )
    return planner.configured(size, ratio, recompute), plan, _why(planner, plan, ratio, ways[:-1])


def _why(planner: Planner, plan: MemoryPlan, ratio: float | None, missed: Sequence[bool]) -> str:
    """Planned memory, and what needs too much.

    Args:
        missed: recomputed or not, the ways in which one row of the usual share does not fit.
    """
    why = (
        f"{format_size(plan.peak)} planned at the peak of a step with {planner.tokens:,} tokens in a row, weights "
        f"included; {describe_budget(planner.config, planner.budget)} may be used."
    )
    with_ratio = "" if ratio is None else f" with r = {ratio:g}"
    for recompute in missed:
        how = "recomputed" if recompute else "not recomputed"
        needs = format_size(planner.of(planner.sizes[0], ratio, recompute).peak)
        why += f" {planner.sizes[0]} x {planner.tokens:,} tokens{with_ratio}, {how}, would need {needs}."
    if not missed and plan.tokens[0] < planner.sizes[-1]:
        needs = format_size(planner.of(planner.sizes[-1], ratio, plan.method.recompute).peak)
        why += f" {planner.sizes[-1]} rows at once would need {needs}."
    return why


def _autos(config: RunConfig) -> list[str]:
    """Names of the settings that are `auto` and settled here."""
    values = {
        _BATCH: config.training.per_device_train_batch_size,
        _RECOMPUTE: config.training.recompute,
        _RATIO: config.selection.ratio if config.scoring.mode == "online" else None,
    }
    return [name for name, value in values.items() if value == "auto"]


def _as_before(config: RunConfig, settled_by: str | None) -> RunConfig:
    """`config` with the values of the run that is gone on with, where they serve."""
    file = Path(settled_by).parent / "config.yaml" if settled_by else None
    if file is None:
        return config
    auto = _autos(config)
    if _RATIO in auto:
        config = _with(config, "selection", ratio=ratio_of_run(file.parent))
    if not file.is_file():
        return config
    before, rows = load_config(file).training, config.training.gradient_accumulation_steps
    if _RECOMPUTE in auto and before.recompute != "auto":
        config = _with(config, "training", recompute=before.recompute)
    size = before.per_device_train_batch_size
    return with_batch(config, size) if _BATCH in auto and isinstance(size, int) and rows % size == 0 else config


def _settled(config: RunConfig) -> RunConfig:
    """Without `memory_budget`, which is for what is `auto`."""
    return config if config.selection.ratio == "auto" else _with(config, "training", memory_budget=None)


def _told(config: RunConfig, names: Sequence[str]) -> str:
    training = config.training
    values = {
        _BATCH: f"{training.per_device_train_batch_size} (x {training.gradient_accumulation_steps} a step)",
        _RECOMPUTE: str(training.recompute).lower(),
        _RATIO: str(config.selection.ratio),
    }
    return ", ".join(f"{name}={values[name]}" for name in names)


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
