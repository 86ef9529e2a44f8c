"""The last layer of a pass over all tokens, of which only those that carry a loss are asked for more than keys.

Loss, error and gradient are those of the supervised tokens. The others are looked at in attention alone: they run up to
their keys and values, by which gradient reaches them too where there is any.

Shapes: B batch, T tokens, R supervised, D hidden, N key/value heads, H head dim.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from tokenseek.ditching.cache import SelectedCache
from tokenseek.ditching.converted import converted_once
from tokenseek.ditching.passes import LayerCode, hidden_states
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.rows import written
from tokenseek.ditching.state import Ditching, Step
from tokenseek.tiling.cache import KeysAndValuesSeen, OnceCache, ProjectedCache


def run_last_layer(
    ditching: Ditching, reach: PlainReach, hidden_BTD: torch.Tensor, arguments: dict[str, Any], cache: OnceCache
) -> Any:
    """The layer's output: as ever for supervised tokens, and what was given, without gradient, for the others.

    Args:
        reach: of the supervised rows, its selected ones, and of the others.
        arguments: of the layer's forward, by name, without hidden states and cache.
        cache: is handed keys and values [B, N, T, H] of all tokens that a supervised one sees.
    """
    layer, decoder = ditching.decoder.layers[-1], ditching.decoder
    code = LayerCode(layer, ditching, Step(reach, set(), None), arguments)
    supervised, others = reach.parts.selected, reach.parts.unselected
    with converted_once(layer, torch.is_grad_enabled(), ditching.recomputes(layer)):
        keys_and_values: tuple[torch.Tensor, ...] = ()
        if others is not None:
            projected = ProjectedCache()
            with suppress(KeysAndValuesSeen):
                code.run_unselected(others.take(hidden_BTD, 1), projected)
            keys_and_values = projected.given_by(layer, decoder)
        joined = SelectedCache(reach, *keys_and_values)
        output = code.run_selected(supervised.take(hidden_BTD, 1), joined)
    cache.update(*joined.given_by(layer, decoder), 0)
    hidden_BRD = hidden_states(output)
    # Not zeros, of which a norm behind the layers might make no number.
    given_BTD = hidden_BTD.detach().to(hidden_BRD.dtype, copy=True)
    all_BTD = written(given_BTD[:, None], hidden_BRD[:, None], supervised)[:, 0]
    return (all_BTD, *output[1:]) if isinstance(output, tuple) else all_BTD
