"""The optimizer of a planned step: which one Trainer would make, and what its step counts for."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from tokenseek.config import RunConfig
from tokenseek.errors import UserError
from tokenseek.launching.engine import Engine
from tokenseek.planning.ledger import nbytes_of
from tokenseek.planning.work import Work
from tokenseek.training.arguments import training_arguments


def optimizer_of(config: RunConfig, engine: Engine) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """The optimizer that Trainer would make, as a function of its parameters."""

    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(config.training.model_copy(update={"mixed_precision": "no"}), Path(folder), 0)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    if not kind.__module__.startswith(("torch.", "transformers.")):
        raise UserError(
            f"training.optim: {config.training.optim} cannot be planned, since its kernels need their device; plan "
            "with adamw_torch, whose states take 8 bytes per trained weight, and correct for yours."
        )
    if not engine.on_cpu and not is_fused(config) and "foreach" in kind.__init__.__code__.co_varnames:
        options["foreach"] = True  # what torch chooses on a GPU; it needs the memory of the gradients once more
    return lambda parameters: kind(parameters, **options)


def is_fused(config: RunConfig) -> bool:
    """Whether the optimizer's step is one operation on a GPU: `training_arguments` has adamw_torch fused there."""
    return config.training.optim in ("adamw_torch", "adamw_torch_fused")


def count_as_one(optimizer: torch.optim.Optimizer, work: Work) -> None:
    """Have `work` count each step of an optimizer as the one operation that it is when it is fused.

    It reads gradients, and reads and writes weights and states.
    """
    counted: list[tuple[int, Counter[tuple[float, int, bool]]]] = []

    def before(*_: Any) -> None:
        counted.append((work.flops, Counter(work.operations)))

    def behind(*_: Any) -> None:
        work.flops, work.operations = counted.pop()
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        states = [x for weight in weights for x in optimizer.state[weight].values() if torch.is_tensor(x)]
        nbytes = 2 * nbytes_of([*weights, *states]) + nbytes_of(weight.grad for weight in weights)
        work.operations[0, nbytes, True] += 1

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(behind)
