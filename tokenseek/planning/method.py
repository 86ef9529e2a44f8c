"""How a planned step trains."""

from __future__ import annotations

from dataclasses import dataclass

from tokenseek.config import RunConfig
from tokenseek.decoder.names import asks_for_checkpointing


@dataclass(frozen=True)
class Method:
    """How a step trains: on all tokens, or on a share `ratio` of them (None: no token ditching).

    Attributes:
        recompute: in the backward pass; the whole layer without ditching, its selected rows with it.
    """

    ratio: float | None = None
    recompute: bool = False

    def __str__(self) -> str:
        name = "all tokens" if self.ratio is None else f"TokenSeek r = {self.ratio:g}"
        return name + (", recomputed" if self.recompute else "")


def method_of(config: RunConfig, ratio: float | None = None) -> Method:
    """The method that a run is configured for; with token ditching at `ratio` if one is given."""
    if ratio is None and not config.training.ditching:
        return Method(None, config.training.recompute or asks_for_checkpointing(config.training.extra))
    if ratio is None:
        ratio = config.selection.to_rule().share
    recompute = config.training.recompute or asks_for_checkpointing(config.training.extra)
    return Method(ratio, recompute)
