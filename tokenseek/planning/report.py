"""A plan in words, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from tokenseek.config import RunConfig
from tokenseek.config.sizes import format_size
from tokenseek.errors import UserError
from tokenseek.planning.budget import Choice
from tokenseek.planning.ledger import CATEGORIES
from tokenseek.planning.longest import LongestOfMethod
from tokenseek.planning.proposal import seconds_per_token
from tokenseek.planning.step import MemoryPlan, most_positions
from tokenseek.planning.work import Gpu


def plan_table(plans: Sequence[MemoryPlan]) -> str:
    """One line for each plan: the bytes of its peak and of its average, then what those of the peak are for."""
    giant = max(plan.peak for plan in plans) >= 2**30
    unit, digits = (2**30, 2) if giant else (2**20, 1)
    columns = [*(name.replace("keys_values", "K/V") for name in CATEGORIES), "on host"]
    lines = [["GiB" if giant else "MiB", "peak", "average", *columns]]
    for plan in plans:
        sizes = [plan.peak, plan.average, *(plan.parts[name] for name in CATEGORIES), plan.host]
        lines.append([str(plan.method), *(f"{size / unit:.{digits}f}" for size in sizes)])
    return _aligned(lines)


def time_table(plans: Sequence[MemoryPlan], name: str, gpu: Gpu) -> str:
    """One line for each plan: what an optimizer step computes, launches and sends, and how long that takes on a GPU."""
    titles = ["TFLOP", "compute s", "launches", "launching s", "tokens/s", "sent GB", "sending s"]
    lines = [[f"{name}, estimate", *titles]]
    for plan in plans:
        work, tokens = plan.work, plan.tokens[0] * plan.tokens[1] * plan.micro_batches / plan.engine.sp_size
        if plan.engine.offload_optimizer or plan.engine.offload_parameters:
            compute = speed = "-"  # bound by the host
        else:
            compute, speed = f"{work.seconds(gpu):.4f}", f"{tokens / work.step_seconds(gpu):,.0f}"
        launching = [f"{work.launches:,}", f"{work.launches * gpu.launch:.4f}"]
        sending = [f"{work.sent / 1e9:.2f}", f"{work.sending_seconds(gpu):.4f}"]
        lines.append([str(plan.method), f"{work.flops / 1e12:.2f}", compute, *launching, speed, *sending])
    return _aligned(lines)


def describe_training(config: RunConfig) -> str:
    """What is trained, and the numbers in which it is held: `QLoRA r = 8, weights in nf4, computed in bf16`."""
    adapter, held = config.peft, config.model.quantization or config.model.dtype
    how = "full fine-tuning"
    if adapter:
        name = "LoRA" if adapter.method == "lora" else adapter.method
        how = f"{'Q' if adapter.method == 'lora' and config.model.quantization else ''}{name}"
        how += f" r = {adapter.r}" if adapter.r else ""
    mixed = config.training.mixed_precision
    return f"{how}, weights in {held}" + (f", computed in {mixed}" if mixed != "no" else "")


def describe_optimizer_peak(plans: Sequence[MemoryPlan], config: RunConfig) -> str | None:
    """That fewer tokens do not make a peak smaller which is the optimizer's step, and what does; None where none is."""
    methods = [str(plan.method) for plan in plans if plan.method.ratio is not None and plan.peaks_in_optimizer]
    if not methods:
        return None
    ways = ["an adapter (--method lora)"] * (config.peft is None)
    ways += ["a model of 4 bits with an adapter (--method qlora)"] * (config.model.quantization is None)
    ways += ["states split over processes (--accelerate-config zero2)"] * (not plans[0].engine.shards_optimizer)
    which = f"{methods[0]} and {len(methods) - 1} more" if len(methods) > 1 else methods[0]
    return (
        f"{which}: the peak is the optimizer's step, which holds the trained weights, their gradients and states; "
        f"selection saves nothing at this peak{'; what does: ' if ways else ''}{' or '.join(ways)}."
    )


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def describe_loading(plan: MemoryPlan) -> str | None:
    """What is held before the first step, where that is more than a process has in it."""
    if not plan.loading:
        return None
    return (
        f"Before the first step every process packs all weights and holds {format_size(plan.loading)}, until they are "
        "split."
    )


def describe_length(model_config: PreTrainedConfig, tokens: int) -> str | None:
    """What a length beyond the model's positions needs; None where it has as many.

    Raises:
        UserError: its positions are learned, and there are no more.
    """
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or tokens
    if tokens <= positions:
        return None
    if most_positions(model_config):
        raise UserError(
            f"{tokens:,} tokens: the model has {positions:,} positions and learned each of them; give --tokens or "
            f"data.max_length up to {positions}."
        )
    return (
        f"{tokens:,} tokens are more than the {positions:,} positions that the model was trained for: its config.json "
        f'would need rotary scaling, such as "rope_type": "yarn" with "factor": {-(-tokens // positions)}.0. Memory is '
        "the same."
    )


def longest_table(found: Sequence[LongestOfMethod], budgets: Sequence[int]) -> str:
    """One line for each method: tokens of the longest example in each budget; what the longest keeps on the host."""
    lines = [["longest example, tokens", *map(format_size, budgets), "on host"]]
    for each in found:
        lengths = [f"{n:,}" if n else "-" for n in each.tokens]
        lines.append([str(each.method), *lengths, format_size(each.plan.host) if each.plan and each.plan.host else "-"])
    return _aligned(lines)


def describe_proposals(plans: Sequence[MemoryPlan], name: str, gpu: Gpu) -> str:
    """One line for each plan, the fastest first, and the settings of that one."""
    lines = [[f"fits, fastest on {name} first", "micro batch", "peak", "on host", "tokens/s"]]
    for plan in plans:
        speed = f"{1 / seconds_per_token(plan, gpu):,.0f}"
        host = format_size(plan.host) if plan.host else "-"
        lines.append(
            [str(plan.method), f"{plan.tokens[0]} x {plan.micro_batches}", format_size(plan.peak), host, speed]
        )
    best = plans[0]
    settings = {
        "selection.ratio": f"{best.method.ratio:g}",
        "training.per_device_train_batch_size": best.tokens[0],
        "training.gradient_accumulation_steps": best.micro_batches,
        "training.recompute": str(best.method.recompute).lower(),
        "training.kv_storage": best.method.kv_storage,
    }
    return _aligned(lines) + "\n  " + " ".join(f"--set {key}={value}" for key, value in settings.items())


def describe_choice(choice: Choice, budget: int) -> str:
    """What :func:`largest_ratio` found, with the way to set it."""
    size = format_size(budget)
    if choice.ratio is not None:
        return (
            f"{size}: r = {choice.ratio:g} is the largest share that fits; its peak is "
            f"{format_size(choice.plan.peak)}.\n  --set selection.ratio={choice.ratio:g}"
        )
    lines = [f"{size}: nothing fits; {choice.plan.method} needs {format_size(choice.plan.peak)}. At that share,"]
    for knob in choice.knobs:
        verdict = "fits" if knob.fits else "is not enough alone"
        lines.append(f"  {knob.how}\n    {verdict}: {format_size(knob.plan.peak)}")
    return "\n".join(lines)
