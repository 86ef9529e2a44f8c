"""Sliding windows in a pass over all tokens, without a mask of all rows and keys.

Shapes: B batch, T tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from tokenseek.decoder.attention import Attention, Replace, attention_replaced
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import SlidingWindow, makes_masks_by_utils, takes_windows, whole_masks
from tokenseek.tiling.staircase import Span, attention_in_spans, make_window_spans

# Replaces the attention function in a block.
Replaced: TypeAlias = Callable[[Replace], AbstractContextManager[None]]


def windows_served(original: Attention) -> Attention:
    """`original`, which may also be given a :class:`SlidingWindow` for a mask, with a query for every key."""

    def attention(
        module: nn.Module,
        query_BNTH: torch.Tensor,
        key_BKTH: torch.Tensor,
        value_BKTH: torch.Tensor,
        attention_mask: torch.Tensor | SlidingWindow | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(attention_mask, SlidingWindow):
            return original(module, query_BNTH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs)
        window, batch, tokens, device = attention_mask, len(query_BNTH), query_BNTH.shape[2], query_BNTH.device

        def spans_of(query: torch.Tensor) -> list[list[Span]]:
            return make_window_spans([range(tokens)], window, device, query.dtype) * batch

        output = attention_in_spans(query_BNTH, key_BKTH, value_BKTH, spans_of, *args, **kwargs)
        if output is not None:
            return output, None
        positions_T = torch.arange(tokens, device=device)
        seen_11TT = window.seen(positions_T[:, None], positions_T)[None, None]
        return original(module, query_BNTH, key_BKTH, value_BKTH, seen_11TT, *args, **kwargs)

    return attention


def with_windows(decoder: Decoder, tokens: int) -> Replaced | None:
    """What a pass over texts of `tokens` tokens runs in, so that its windows are no masks of all rows and keys.

    None where its masks may not be others. The body has to be given an ``attention_mask`` of ones.
    """
    if not (makes_masks_by_utils(decoder) and takes_windows(decoder)):
        return None

    @contextmanager
    def replaced(replace: Replace) -> Iterator[None]:
        with (
            whole_masks(decoder, tokens, None, None, windows=True),
            attention_replaced(decoder.causal_lm, lambda original: replace(windows_served(original))),
        ):
            yield

    return replaced
