"""Whether this launch can train with steps that select their own tokens, and how many layers are exact in them."""

from __future__ import annotations

import logging

from accelerate import PartialState

from tokenseek.config import RunConfig
from tokenseek.errors import UserError
from tokenseek.launching import environment
from tokenseek.launching.engine import launched_engine
from tokenseek.launching.processes import log_once

_log = logging.getLogger(__name__)


def settle_exact_layers(config: RunConfig, state: PartialState) -> RunConfig:
    """`config` with a number for `selection.exact_layers`: `auto` is 1.

    Raises:
        UserError: steps that select their own tokens are asked for in a launch whose engine splits the model.
    """
    if not config.training.ditching or config.scoring.mode == "index":
        return config
    if environment.uses_fsdp() or launched_engine(on_cpu=state.device.type == "cpu").shards_parameters:
        raise UserError(
            "scoring.mode: online runs every layer twice before the backward pass, which is incompatible with this "
            "launch: ZeRO-3 and accelerate's FSDP2 split the model's weights. Select from an index (--set "
            "scoring.mode=index --set selection.exact_layers=0), or launch with ddp.yaml or zero2.yaml."
        )
    if config.selection.exact_layers != "auto":
        return config
    log_once(_log, state, "selection.exact_layers: auto: 1.")
    return config.model_copy(update={"selection": config.selection.model_copy(update={"exact_layers": 1})})
