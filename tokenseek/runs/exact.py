"""How many layers are exact in steps that select their own tokens."""

from __future__ import annotations

import logging

from accelerate import PartialState

from tokenseek.config import RunConfig
from tokenseek.launching.processes import log_once

_log = logging.getLogger(__name__)


def settle_exact_layers(config: RunConfig, state: PartialState) -> RunConfig:
    """`config` with a number for `selection.exact_layers`: `auto` is 1."""
    if not config.training.ditching or config.scoring.mode == "index" or config.selection.exact_layers != "auto":
        return config
    log_once(_log, state, "selection.exact_layers: auto: 1.")
    return config.model_copy(update={"selection": config.selection.model_copy(update={"exact_layers": 1})})
