"""Attention from some rows to all keys, without the waste of doing it as if they were any rows.

Both rewrites give the same numbers as the model's own call; they apply where the model's backend is sdpa.

Shapes: B batch, T tokens, S selected, U unselected, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tokenseek.decoder.attention import Attention, Replace
from tokenseek.decoder.masks import SlidingWindow
from tokenseek.ditching.side_by_side import SideBySide
from tokenseek.tiling.rows import Rows
from tokenseek.tiling.staircase import Span, attention_in_spans, make_spans, make_window_spans

# What sdpa's function reads from an attention module, for one without grouped heads: it then repeats no key or value.
_UNGROUPED = SimpleNamespace(is_causal=True)
# Kernels count the entries of a mask in 32 bits.
MOST_MASK_ENTRIES = 2**31 - 1


def unselected_attention(rows: Rows, on_call: Callable[[], None]) -> Replace:
    """A replacement (see :func:`tokenseek.decoder.attention.attention_replaced`) for the unselected pass.

    Where the mask is plain causality (None), the queries are put back to their places among T, so that the causal
    flash kernels can be used: half the work of a masked kernel, and no [U, T] mask.

    Args:
        on_call: called when the layer looks its attention function up and finds this one.
    """

    def replace(original: Attention) -> Attention:
        def attention(
            module: nn.Module,
            query_BNUH: torch.Tensor,
            key_BKTH: torch.Tensor,
            value_BKTH: torch.Tensor,
            attention_mask: torch.Tensor | SlidingWindow | None,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            on_call()
            if isinstance(attention_mask, SlidingWindow):
                spans_of = partial(_window_spans, rows, attention_mask)
                in_spans = attention_in_spans(query_BNUH, key_BKTH, value_BKTH, spans_of, *args, **kwargs)
                if in_spans is not None:
                    return in_spans, None
                attention_mask = rows.window_mask(attention_mask)
            keys = key_BKTH.shape[2]  # T, or fewer where the last tokens are in no pass
            if attention_mask is not None:
                outputs = []
                for first, last, _ in _within_limit([(0, query_BNUH.shape[2], 0)], attention_mask[..., :1, :].numel()):
                    mask, query = attention_mask[:, :, first:last, :keys], query_BNUH[:, :, first:last]
                    outputs.append(original(module, query, key_BKTH, value_BKTH, mask, *args, **kwargs)[0])
                return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None
            query_BNTH = rows.spread(query_BNUH)[:, :, :keys]
            output_BTNH, _ = original(module, query_BNTH, key_BKTH, value_BKTH, None, *args, **kwargs)
            return rows.take(output_BTNH, 1), None

        return attention

    return replace


def selected_attention(rows: Rows, on_call: Callable[[], None], order: SideBySide | None = None) -> Replace:
    """A replacement for the selected pass, in which keys and values are stored for the backward pass.

    Where the mask is plain causality (None) and rows are many, no mask of rows times keys is made
    (:mod:`tokenseek.tiling.staircase`).

    Under a mask, sdpa repeats keys and values for every query head of a group. Queries of a group are taken as G times
    the rows of one head instead, so that autograd stores the keys and values of K heads and not of N. Early rows, which
    see few keys, are given no others.

    Args:
        on_call: called when the layer looks its attention function up and finds this one.
        order: of keys and values; that of the text by default.
    """

    def replace(original: Attention) -> Attention:
        def attention(
            module: nn.Module,
            query_BNSH: torch.Tensor,
            key_BKTH: torch.Tensor,
            value_BKTH: torch.Tensor,
            attention_mask: torch.Tensor | SlidingWindow | None,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            on_call()
            if isinstance(attention_mask, SlidingWindow):
                window = attention_mask
                spans_of = partial(_window_spans, rows, window)
                in_spans = attention_in_spans(query_BNSH, key_BKTH, value_BKTH, spans_of, *args, **kwargs)
                if in_spans is not None:
                    return in_spans, None
                attention_mask = rows.once(f"{window}", rows.index_BR, lambda: rows.window_mask(window))
            spans, is_biased = rows.spans, kwargs.get("position_bias") is not None
            if order is not None and attention_mask is None and not is_biased:
                attention_mask, spans = order.causal_mask, [(0, query_BNSH.shape[2], order.keys)]
            elif order is not None:  # what a layer makes for its keys takes them to be in the order of the text
                key_BKTH, value_BKTH = order.in_text_order(key_BKTH, value_BKTH)
            elif attention_mask is None:
                spans_of = partial(_causal_spans, rows)
                in_spans = attention_in_spans(query_BNSH, key_BKTH, value_BKTH, spans_of, *args, **kwargs)
                if in_spans is not None:
                    return in_spans, None
            if attention_mask is None:
                attention_mask = rows.causal_mask
            most = key_BKTH.shape[2]
            if attention_mask.shape[1] > 1 or is_biased:
                mask = attention_mask[..., :most]
                return original(module, query_BNSH, key_BKTH, value_BKTH, mask, *args, **kwargs)
            batch, heads = query_BNSH.shape[:2]
            groups = heads // key_BKTH.shape[1]
            outputs = []
            for first, last, keys in _within_limit(spans, batch * groups):
                span = first, last, min(keys, most)
                # q: (B, N, S, H) -> (B, K, G * S, H): the heads of a group are neighbours
                packed = query_BNSH[:, :, first:last].unflatten(1, (-1, groups)).flatten(2, 3)
                given: tuple[torch.Tensor, ...] = packed, key_BKTH[:, :, : span[2]], value_BKTH[:, :, : span[2]]
                if batch == 1:  # heads are the batch: the gradient of queries is then no copy
                    given = tuple(x.transpose(0, 1) for x in given)
                mask = rows.packed_mask(attention_mask, span, groups, packed.dtype)
                output, _ = original(_UNGROUPED, *given, mask, *args, **kwargs)
                if batch == 1:  # (K, G * S, 1, H)
                    output = output.transpose(0, 2)
                # o: (B, G * S, K, H) -> (B, G, S, K, H) -> (B, S, K, G, H) -> (B, S, N, H)
                outputs.append(output.unflatten(1, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3))
            return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None

        return attention

    return replace


def _causal_spans(rows: Rows, query_BNSH: torch.Tensor) -> list[list[Span]] | None:
    """The spans of these rows, which look at all keys before them; None where one masked call is faster."""
    device, dtype = query_BNSH.device, query_BNSH.dtype

    def make() -> list[list[Span]] | None:
        positions_BS = rows.on_host
        return None if positions_BS is None else make_spans(positions_BS, rows.tokens, device, dtype)

    return rows.once(f"staircase.{dtype}", rows.index_BR, make)


def _window_spans(rows: Rows, window: SlidingWindow, query_BNSH: torch.Tensor) -> list[list[Span]] | None:
    """The spans of these rows, which look at a window each; None where they have no order."""
    device, dtype = query_BNSH.device, query_BNSH.dtype

    def make() -> list[list[Span]] | None:
        positions_BS = rows.on_host
        return None if positions_BS is None else make_window_spans(positions_BS, window, device, dtype)

    return rows.once(f"{window}.{dtype}", rows.index_BR, make)


def _within_limit(spans: Sequence[tuple[int, int, int]], entries: int) -> Iterator[tuple[int, int, int]]:
    """`spans` (first row, last, keys), cut where the mask of one would have too many entries for a kernel.

    Args:
        entries: of the mask for one row, or for one row and key where a span says how many keys.
    """
    for first, last, keys in spans:
        rows = max(1, MOST_MASK_ENTRIES // (entries * max(1, keys)))
        for begin in range(first, last, rows):
            yield begin, min(last, begin + rows), keys
