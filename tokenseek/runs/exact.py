"""How many layers are exact in steps that select their own tokens."""

from __future__ import annotations

import logging

from accelerate import PartialState
from transformers import PreTrainedModel

from tokenseek.config import RunConfig
from tokenseek.decoder.find import find_decoder
from tokenseek.errors import UserError
from tokenseek.launching.processes import log_once

_log = logging.getLogger(__name__)


def settle_exact_layers(config: RunConfig, state: PartialState) -> RunConfig:
    """`config` with a number for `selection.exact_layers`."""
    if not config.training.ditching or config.selection.exact_layers != "auto":
        return config
    exact = config.selection.wanted_exact_layers
    log_once(_log, state, f"selection.exact_layers: auto: {exact}.")
    return config.model_copy(update={"selection": config.selection.model_copy(update={"exact_layers": exact})})


def fit_exact_layers(config: RunConfig, skeleton: PreTrainedModel, state: PartialState, *, auto: bool) -> RunConfig:
    """`config` with a `selection.exact_layers` that the model can have.

    Args:
        auto: it was left to this package.

    Raises:
        UserError: the model's top layers take over keys and values from below the layers that are exact.
    """
    exact = config.selection.exact_layers
    if not (config.training.ditching and exact and find_decoder(skeleton).sharing):
        return config
    name = type(skeleton).__name__
    if not auto:
        raise UserError(
            f"selection.exact_layers: {exact}, and {name} has layers that share the keys and values of layers below, "
            "past the border; set it to 0."
        )
    log_once(_log, state, f"selection.exact_layers: auto: 0, since {name} has layers that share keys and values.")
    return config.model_copy(update={"selection": config.selection.model_copy(update={"exact_layers": 0})})
