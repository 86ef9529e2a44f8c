"""The last layer of a pass over all tokens, of which only those that carry a loss are asked for more than keys.

Loss, error and gradient are those of the supervised tokens. The others are looked at in attention alone: they run up to
their keys and values, by which gradient reaches them too where there is any.

Shapes: B batch, T tokens, R supervised, U other rows, D hidden, N key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from tokenseek.decoder.attention import attends_otherwise
from tokenseek.decoder.find import Decoder
from tokenseek.ditching.attention import selected_attention
from tokenseek.ditching.cache import SelectedCache
from tokenseek.ditching.converted import converted_once
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.rows import written
from tokenseek.tiling.cache import KeysAndValuesSeen, OnceCache, ProjectedCache
from tokenseek.tiling.rows import Rows


class LastLayer:
    """The last layer of one step's first pass, which has keys and values of its own.

    Args:
        reach: of the supervised rows, and of the others, in a batch of whole texts.
        recomputed: the step recomputes activations, see :mod:`tokenseek.ditching.converted`.

    Attributes:
        layer: the module.
    """

    def __init__(self, decoder: Decoder, reach: PlainReach, attention_is_ours: bool, recomputed: bool) -> None:
        self.layer, self._decoder, self._reach = decoder.layers[-1], decoder, reach
        self._attention_is_ours, self._recomputed = attention_is_ours, recomputed

    def run(
        self, forward: Callable[..., Any], hidden_BTD: torch.Tensor, arguments: dict[str, Any], cache: OnceCache
    ) -> Any:
        """The layer's output: as ever for supervised tokens, and what was given, without gradient, for the others.

        Args:
            forward: the layer's.
            arguments: its others, by name, without the cache.
            cache: is handed keys and values [B, N, T, H] of all tokens that a supervised one sees.
        """
        reach, decoder, is_ours = self._reach, self._decoder, self._attention_is_ours

        def of(rows: Rows, cache: OnceCache) -> Any:
            shrunk = {name: rows.shrink(name, value, is_ours) for name, value in arguments.items()}
            return forward(rows.take(hidden_BTD, 1), **shrunk, **{decoder.cache_argument: cache})

        supervised, others = reach.parts.selected, reach.parts.unselected
        with converted_once(self.layer, torch.is_grad_enabled(), self._recomputed):
            keys_and_values: tuple[torch.Tensor, ...] = ()
            if others is not None:
                projected = ProjectedCache()
                with suppress(KeysAndValuesSeen):
                    of(others, projected)
                keys_and_values = projected.given_by(self.layer, decoder)
            joined = SelectedCache(reach, *keys_and_values)
            attended: list[bool] = []
            attend = partial(selected_attention, on_call=lambda: attended.append(True))
            replace = reach.replacement(reach.whole.selected, attend) if is_ours else None
            with reach.attention(decoder, replace, joined):
                output = of(supervised, joined)
        if is_ours and not attended:
            raise attends_otherwise(self.layer, decoder)
        cache.update(*joined.given_by(self.layer, decoder), 0)
        hidden_BRD = output[0] if isinstance(output, tuple) else output
        # Not zeros, of which a norm behind the layers might make no number.
        given_BTD = hidden_BTD.detach().to(hidden_BRD.dtype, copy=True)
        all_BTD = written(given_BTD[:, None], hidden_BRD[:, None], supervised)[:, 0]
        return (all_BTD, *output[1:]) if isinstance(output, tuple) else all_BTD
