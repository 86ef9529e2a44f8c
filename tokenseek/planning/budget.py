"""Which share of the tokens fits into a given memory, and what else would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from tokenseek.config import PeftSettings, RunConfig
from tokenseek.launching.engine import Engine
from tokenseek.planning.method import method_of
from tokenseek.planning.step import MemoryPlan, load_model_config, plan_memory

# Ratios are chosen in steps of a percent.
_STEPS = 100


@dataclass(frozen=True)
class Knob:
    """Another setting, and what it would do: the memory at the smallest ratio.

    Attributes:
        how: what to write on the command line.
    """

    how: str
    plan: MemoryPlan
    fits: bool


@dataclass(frozen=True)
class Choice:
    """The largest ratio that fits, and its plan; without one, the plan of the smallest ratio and other knobs."""

    ratio: float | None
    plan: MemoryPlan
    knobs: tuple[Knob, ...] = ()


def largest_ratio(
    config: RunConfig,
    budget: int,
    engine: Engine | None = None,
    *,
    tokens: int | None = None,
    model_config: PreTrainedConfig | None = None,
    most: float = 1.0,
) -> Choice:
    """The largest share of the tokens, in steps of 1 %, at which a training step stays within `budget` bytes.

    Args:
        most: no larger share is wanted.

    Example:
        >>> largest_ratio(load_config("llama-3.2-1b"), 12 * 2**30).ratio
    """
    engine = engine or Engine()
    model_config = model_config or load_model_config(config)
    known: dict[int, MemoryPlan] = {}

    def plan(step: int) -> MemoryPlan:
        if step not in known:
            method = method_of(config, step / _STEPS)
            known[step] = plan_memory(config, method, engine, tokens=tokens, model_config=model_config)
        return known[step]

    low, high = 1, max(1, round(most * _STEPS))
    if plan(low).peak > budget:
        knobs = []
        for how, changed, other_engine, other_tokens in _knobs(config, engine, tokens or config.data.max_length):
            other = plan_memory(
                changed, method_of(changed, low / _STEPS), other_engine, tokens=other_tokens, model_config=model_config
            )
            if other.peak < plan(low).peak:
                knobs.append(Knob(how, other, other.peak <= budget))
        return Choice(None, plan(low), tuple(sorted(knobs, key=lambda knob: knob.plan.peak)))
    if plan(high).peak <= budget:
        return Choice(high / _STEPS, plan(high))
    # `low` fits and `high` does not. Memory is almost linear in the ratio, so the line between them is the better guess
    # than their middle, except where it keeps falling on the same side.
    side, same_side = 0, 0
    while high - low > 1:
        slope = (budget - known[low].peak) / (known[high].peak - known[low].peak)
        guess = (low + high) // 2 if same_side >= 2 else low + int(slope * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        fits = plan(guess).peak <= budget
        low, high = (guess, high) if fits else (low, guess)
        same_side = same_side + 1 if side == (1 if fits else -1) else 1
        side = 1 if fits else -1
    return Choice(low / _STEPS, plan(low))


def _knobs(config: RunConfig, engine: Engine, tokens: int) -> Iterator[tuple[str, RunConfig, Engine, int]]:
    """Single changes that may save memory, with how to make them."""

    def changed(section: str, **values: Any) -> RunConfig:
        return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    if config.training.optim == "adamw_torch" and not engine.on_cpu:
        yield "--set training.optim=adamw_torch_fused", changed("training", optim="adamw_torch_fused"), engine, tokens
    if config.training.recompute is not True:
        yield "--set training.recompute=true", changed("training", recompute=True), engine, tokens
    if config.training.kv_storage == "device" and not engine.on_cpu:
        yield "--set training.kv_storage=host", changed("training", kv_storage="host"), engine, tokens
    if config.scoring.mode == "online" and config.selection.exact_layers:
        yield "--set selection.exact_layers=0", changed("selection", exact_layers=0), engine, tokens
    if (batch := config.training.micro_batch) > 1:
        steps = config.training.gradient_accumulation_steps * batch
        one = changed("training", per_device_train_batch_size=1, gradient_accumulation_steps=steps)
        yield (
            f"--set training.per_device_train_batch_size=1 --set training.gradient_accumulation_steps={steps}",
            one,
            engine,
            tokens,
        )
    if tokens > 128:
        yield f"--set data.max_length={tokens // 2}", config, engine, tokens // 2
    with_lora = config if config.peft else config.model_copy(update={"peft": PeftSettings(r=8)})
    if not config.peft:
        yield "--set peft.method=lora --set peft.r=8", with_lora, engine, tokens
    takes_packed = not config.peft or config.peft.method == "lora"
    if takes_packed and not config.model.quantization:
        model = config.model.model_copy(update=dict(quantization="nf4", double_quantization=True))
        how = "--set model.quantization=nf4 --set model.double_quantization=true"
        how += "" if config.peft else " --set peft.method=lora --set peft.r=8"
        yield how, with_lora.model_copy(update={"model": model}), engine, tokens
    if engine.sp_size > 1 or config.model.quantization == "int8":
        return
    if engine.processes > 1 and not engine.shards_parameters:
        yield "--accelerate-config fsdp2", config, replace(engine, kind="fsdp2"), tokens
    if not engine.offload_parameters:
        offloaded = replace(engine, kind="zero3", offload_optimizer=True, offload_parameters=True)
        yield "--accelerate-config zero3_offload", config, offloaded, tokens
