"""Steps that select their own tokens, in a plan: where all tensors are fake, the rows are decided beforehand.

Shapes: B batch, S selected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokenseek.config import RunConfig
from tokenseek.ditching import Seeking, online
from tokenseek.launching.engine import Engine
from tokenseek.planning.method import Method
from tokenseek.selection.batched import Selection


def is_online(config: RunConfig, method: Method) -> bool:
    """Whether a step with `method` scores and selects its tokens itself."""
    return config.scoring.mode == "online" and method.ratio is not None


def seeking_of(config: RunConfig, engine: Engine) -> Seeking | None:
    """How its tokens are scored; None where an index has them."""
    if config.scoring.mode != "online":
        return None
    exact = config.selection.exact_layers
    if exact == "auto":  # as `tokenseek.runs.exact` settles it
        exact = 0 if engine.shards_parameters else 1
    return Seeking(config.scoring.reduction, config.scoring.gradient_layer, exact)


@contextmanager
def selecting_as_planned(positions_BS: torch.Tensor) -> Iterator[None]:
    """In the block, a step selects `positions_BS`, whatever the scores."""

    def select(rule, examples, keys_E, context_BT, gradient_BT, supervised_BT) -> Selection:
        return Selection(positions_BS, torch.ones(positions_BS.shape))

    before = online.select_batch, online.examples_of
    online.select_batch, online.examples_of = select, lambda mask, position_ids, shape: [None] * shape[0]
    try:
        yield
    finally:
        online.select_batch, online.examples_of = before
