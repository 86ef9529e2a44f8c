"""What a run is about to do, as log lines: an example, what is trained, the memory that is planned, where it writes."""

from __future__ import annotations

import logging

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from tokenseek.config import RunConfig
from tokenseek.config.sizes import format_size
from tokenseek.errors import first_line
from tokenseek.launching.memory import free_memory_bytes
from tokenseek.planning import MemoryPlan, launched_engine, method_of, plan_memory
from tokenseek.reporting import render_labels
from tokenseek.runs.inputs import RunInputs

_log = logging.getLogger(__name__)

_TOKENS_SHOWN = 120


def log_outline(
    config: RunConfig, inputs: RunInputs, training: Dataset, model: nn.Module, tokens: int, plan: MemoryPlan | None
) -> None:
    """The main process logs it; every process may call this, before any weight is loaded.

    Args:
        model: on the meta device, with the run's adapter.
        tokens: of the longest row of a batch, for the plan of a step.
        plan: of a step, where one was made before.
    """
    if not inputs.state.is_main_process:
        return
    _log.info(_example(inputs.tokenizer, training))
    _log.info(_trained(config, model, inputs.state.num_processes))
    _log.info(_memory(config, inputs, tokens, plan))
    _log.info(f"writes to: {config.output_dir} (checkpoints, metrics.jsonl, summary.json; the result in final/)")


def _example(tokenizer: PreTrainedTokenizerBase, training: Dataset) -> str:
    example = training[0]
    ids, labels = example["input_ids"], example["labels"]
    text = render_labels(tokenizer, ids[:_TOKENS_SHOWN], labels[:_TOKENS_SHOWN], color=False)
    more = f"\n... {len(ids) - _TOKENS_SHOWN:,} more tokens" if len(ids) > _TOKENS_SHOWN else ""
    return f"first example, tokens with a loss in [[ ]]:\n{text}{more}"


def _trained(config: RunConfig, model: nn.Module, processes: int) -> str:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, all_of_them = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    how = f"{config.peft.method} adapters" if config.peft else "all weights"
    held = config.model.quantization or config.model.dtype
    settings = config.training
    rows = settings.micro_batch * settings.gradient_accumulation_steps
    return (
        f"trains: {how}, {trained:,} of {all_of_them:,} parameters ({trained / all_of_them:.2%}), the model in {held}; "
        f"{rows} rows a step on each of {processes} process{'es' * (processes > 1)}, "
        f"learning rate {settings.learning_rate:g}"
    )


def _memory(config: RunConfig, inputs: RunInputs, tokens: int, plan: MemoryPlan | None) -> str:
    on_cpu = inputs.state.device.type == "cpu"
    try:
        plan = plan or plan_memory(config, method_of(config), launched_engine(on_cpu), tokens=tokens)
    except Exception as error:  # a plan is advice: what cannot be planned may well be trained
        return f"memory: not planned ({first_line(error)})"
    free = free_memory_bytes(inputs.state)
    told = (
        f"memory: {format_size(plan.peak)} planned at the peak of a step with {tokens:,} tokens in a row, weights "
        f"included; {format_size(free)} are free"
    )
    if plan.loading:
        told += f"; {format_size(plan.loading)} are held before it, until the packed weights are split"
    if max(plan.peak, plan.loading) <= free:
        return told
    return f"{told}. WARNING: this may not fit; `tokenseek plan --budget` lists what would help"
