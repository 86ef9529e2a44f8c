"""Steps that select their own tokens, in a plan: where all tensors are fake, the rows are decided beforehand.

Shapes: B batch, S selected.
"""

from __future__ import annotations

import torch

from tokenseek.config import RunConfig
from tokenseek.ditching import Seeking
from tokenseek.ditching.reach import Reach
from tokenseek.ditching.recorded import Gathered
from tokenseek.ditching.state import Decided
from tokenseek.planning.method import Method
from tokenseek.selection.batched import Selection


def is_online(config: RunConfig, method: Method) -> bool:
    """Whether a step with `method` scores and selects its tokens itself."""
    return config.scoring.mode == "online" and method.ratio is not None


def seeking_of(config: RunConfig) -> Seeking | None:
    """How its tokens are scored; None where an index has them."""
    if config.scoring.mode != "online":
        return None
    scoring = config.scoring
    return Seeking(scoring.reduction, scoring.gradient_layer, config.selection.wanted_exact_layers)


def decided(reach: Reach, gathered: Gathered | None) -> Decided:
    """That a step selects the selected rows of `reach`, whatever the scores.

    Args:
        gathered: where an engine splits the model's weights.
    """
    positions_BS = reach.parts.selected.index_BR
    return Decided(Selection(positions_BS, torch.ones(positions_BS.shape)), reach, gathered)
