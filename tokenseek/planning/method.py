"""The methods of training that are planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenseek.config import RunConfig
from tokenseek.decoder.names import asks_for_checkpointing

_STORED = {"host": "K/V on host", "int8": "8-bit K/V", "int8_host": "8-bit K/V on host"}


@dataclass(frozen=True)
class Method:
    """How a step trains: on all tokens, or on a share `ratio` of them (None: no token ditching).

    Attributes:
        recompute: in the backward pass; the whole layer without ditching, its selected rows with it.
        kv_storage: as ``training.kv_storage``, with ditching; None: as the run has it.
        chunked_loss: without ditching: the head and the loss take a few rows at a time, as they do with it.
        offload: without ditching, recomputed: what enters each layer waits for the backward pass in host memory.
    """

    ratio: float | None = None
    recompute: bool = False
    kv_storage: str | None = None
    chunked_loss: bool = False
    offload: bool = False

    def __str__(self) -> str:
        words = ["all tokens" if self.ratio is None else f"TokenSeek r = {self.ratio:g}"]
        words += ["recomputed"] * self.recompute + ["chunked loss"] * self.chunked_loss + ["on host"] * self.offload
        words += [_STORED[self.kv_storage]] if self.kv_storage in _STORED else []
        return ", ".join(words)


def method_of(config: RunConfig, ratio: float | None = None) -> Method:
    """The method that a run is configured for; with token ditching at `ratio` if one is given.

    ``recompute: auto`` is planned without: that plan decides it.
    """
    recompute = config.training.recompute is True or asks_for_checkpointing(config.training.extra)
    if ratio is None and not config.training.ditching:
        return Method(None, recompute)
    if ratio is None:
        ratio = config.selection.to_rule().share
    return Method(ratio, recompute)


def methods_of_table(config: RunConfig, ratios: Sequence[float]) -> list[Method]:
    """Ordinary training and what makes it smaller; token ditching at these shares, and what makes it smaller."""
    ordinary = [Method(), Method(recompute=True), *recomputed_ordinary()]
    selected = [method_of(config, ratio) for ratio in ratios]
    return list({str(method): method for method in [*ordinary, *selected, *_recomputed_selected(ratios[0])]}.values())


def methods_of_lengths(ratio: float) -> list[Method]:
    """Ordinary training, what peers do for long examples, and token ditching with what makes it smaller."""
    selected = [Method(ratio, True, storage) for storage in ("device", "host", "int8_host")]
    return [Method(), *recomputed_ordinary(), *selected]


def recomputed_ordinary() -> list[Method]:
    """Checkpointing with the head in chunks; with what it keeps on the device, and on the host."""
    return [Method(recompute=True, chunked_loss=True), Method(recompute=True, chunked_loss=True, offload=True)]


def _recomputed_selected(ratio: float) -> list[Method]:
    return [Method(ratio, True, storage) for storage in ("device", "int8", "host", "int8_host")]
