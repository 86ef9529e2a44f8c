"""Attention from some rows to all keys, without the waste of doing it as if they were any rows.

Both rewrites give the same numbers as the model's own call; they apply where the model's backend is sdpa.

Shapes: B batch, T tokens, S selected, U unselected, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from tokenseek.ditching.rows import Rows

# What sdpa's function reads from an attention module, for one without grouped heads: it then repeats no key or value.
_UNGROUPED = SimpleNamespace(is_causal=True)


def unselected_attention(rows: Rows, on_call: Callable[[], None]) -> Callable[[Callable], Callable]:
    """A replacement (see :func:`tokenseek.decoder.attention.attention_replaced`) for the unselected pass.

    Where the mask is plain causality (None), the queries are put back to their places among T, so that the causal
    flash kernels serve: half the work of a masked kernel, and no [U, T] mask.
    """

    def replace(original):
        def attention(module: nn.Module, query_BNUH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs):
            on_call()
            if attention_mask is not None:
                return original(module, query_BNUH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs)
            query_BNTH = rows.spread(query_BNUH)
            output_BTNH, _ = original(module, query_BNTH, key_BKTH, value_BKTH, None, *args, **kwargs)
            return rows.take(output_BTNH, 1), None

        return attention

    return replace


def selected_attention(rows: Rows) -> Callable[[Callable], Callable]:
    """A replacement for the selected pass, in which keys and values are stored for the backward pass.

    Under a mask, sdpa repeats them for every query head of a group. Queries of a group are taken as G times the rows of
    one head instead, so that autograd stores the keys and values of K heads and not of N. Early rows, which see few
    keys, are given no others.
    """

    def replace(original):
        def attention(module: nn.Module, query_BNSH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs):
            if attention_mask is None or attention_mask.shape[1] > 1 or kwargs.get("position_bias") is not None:
                return original(module, query_BNSH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs)
            groups = query_BNSH.shape[1] // key_BKTH.shape[1]
            outputs = []
            for span in rows.spans:
                first, last, keys = span
                # q: (B, N, S, H) -> (B, K, G * S, H): the heads of a group are neighbours
                packed = query_BNSH[:, :, first:last].unflatten(1, (-1, groups)).flatten(2, 3)
                mask = rows.packed_mask(attention_mask, span, groups, packed.dtype)
                output, _ = original(
                    _UNGROUPED, packed, key_BKTH[:, :, :keys], value_BKTH[:, :, :keys], mask, *args, **kwargs
                )
                # o: (B, G * S, K, H) -> (B, G, S, K, H) -> (B, S, K, G, H) -> (B, S, N, H)
                outputs.append(output.unflatten(1, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3))
            return torch.cat(outputs, dim=1), None

        return attention

    return replace
