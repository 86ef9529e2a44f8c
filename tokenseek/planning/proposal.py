"""Micro batch, share of tokens, recomputation and storage together: what fits into a given memory, and how fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedConfig

from tokenseek.config import RunConfig
from tokenseek.launching.engine import Engine
from tokenseek.planning.method import Method
from tokenseek.planning.step import MemoryPlan, load_model_config, plan_memory
from tokenseek.planning.work import EFFICIENCY, Gpu

# From fast to small.
_WAYS = ((False, "device"), (True, "device"), (True, "host"))
# Bytes per second between a GPU and its host, one way (PCIe 4.0 x16).
HOST_LINK = 32e9


def proposals(
    config: RunConfig,
    budget: int,
    gpu: Gpu,
    engine: Engine | None = None,
    *,
    ratios: Sequence[float],
    tokens: int | None = None,
    model_config: PreTrainedConfig | None = None,
) -> list[MemoryPlan]:
    """Plans that fit into `budget` bytes, the fastest first: for each share the fastest ways, with the most examples.

    Rows of an optimizer step stay the same: a larger micro batch takes fewer accumulation steps.
    """
    model_config = model_config or load_model_config(config)
    rows = config.training.micro_batch * config.training.gradient_accumulation_steps
    found: list[MemoryPlan] = []
    for ratio in ratios:
        for recompute, storage in _WAYS:
            largest = None
            for batch in _batches(rows):
                changed = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=rows // batch)
                training = config.training.model_copy(update=changed)
                plan = plan_memory(
                    config.model_copy(update={"training": training}),
                    Method(ratio, recompute, storage),
                    engine,
                    tokens=tokens,
                    model_config=model_config,
                )
                if plan.peak > budget:
                    break
                largest = plan
            if largest is not None:
                found.append(largest)
                break  # what is smaller is slower
    return sorted(found, key=lambda plan: seconds_per_token(plan, gpu))


def seconds_per_token(plan: MemoryPlan, gpu: Gpu) -> float:
    """Of a step on `gpu`, in which what is kept on the host crosses the bus twice, beside the computing."""
    crossing = 2 * plan.host * plan.micro_batches / HOST_LINK / EFFICIENCY
    return max(plan.work.step_seconds(gpu), crossing) / (plan.tokens[0] * plan.tokens[1] * plan.micro_batches)


def _batches(rows: int) -> Iterator[int]:
    """Micro batches that divide the rows of a step: powers of two."""
    batch = 1
    while rows % batch == 0 and batch <= 8:
        yield batch
        batch *= 2
