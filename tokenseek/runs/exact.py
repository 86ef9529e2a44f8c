"""`selection.exact_layers`: whether this launch can train top layers on all tokens, and the number that is meant."""

from __future__ import annotations

from accelerate import PartialState

from tokenseek.config import RunConfig
from tokenseek.errors import UserError
from tokenseek.launching import environment
from tokenseek.launching.engine import launched_engine


def settle_exact_layers(config: RunConfig, state: PartialState) -> RunConfig:
    """`config` with a number for `selection.exact_layers`: `auto` is 1 where the launch allows it, else 0.

    Raises:
        UserError: a number was asked for in a launch that does not allow it; online steps are asked for under FSDP.
    """
    if config.training.ditching and config.scoring.mode == "online" and environment.uses_fsdp():
        raise UserError(
            "scoring.mode: online is incompatible with accelerate's FSDP2, which shards the final norm together with "
            "the head. Set it to index, or launch with ddp.yaml, zero2.yaml or zero3.yaml."
        )
    asked = config.selection.exact_layers
    if asked == 0 or not config.training.ditching:
        return config
    engine = launched_engine(on_cpu=state.device.type == "cpu")
    obstacle = None
    if engine.shards_parameters:
        obstacle = "ZeRO-3 and FSDP let a layer's weights go between its two backward passes"
    if asked != "auto" and obstacle:
        raise UserError(
            f"selection.exact_layers is {asked}, but {obstacle}. Set it to 0 or auto, or launch with ddp.yaml or "
            "zero2.yaml."
        )
    if asked != "auto":
        return config
    layers = 0 if obstacle else 1
    state.print(f"selection.exact_layers: auto: {layers}{f', since {obstacle}' if obstacle else ''}.")
    return config.model_copy(update={"selection": config.selection.model_copy(update={"exact_layers": layers})})
