"""Attention from some rows to all keys, without the waste of doing it as if they were any rows.

Both rewrites give the same numbers as the model's own call; they apply where the model's backend is sdpa.

Shapes: B batch, T tokens, S selected, U unselected, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import nn

from tokenseek.ditching.rows import Rows

# What sdpa's function reads from an attention module, for one without grouped heads: it then repeats no key or value.
_UNGROUPED = SimpleNamespace(is_causal=True)


def unselected_attention(rows: Rows, on_call: Callable[[], None]) -> Callable[[Callable], Callable]:
    """A replacement (see :func:`tokenseek.attention.attention_replaced`) for the unselected pass.

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
    one head instead, so that autograd stores the keys and values of K heads and not of N.
    """

    def replace(original):
        def attention(module: nn.Module, query_BNSH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs):
            batch, heads, selected, head_dim = query_BNSH.shape
            groups = heads // key_BKTH.shape[1]
            one_mask_for_all_heads = attention_mask is not None and attention_mask.shape[1] == 1
            if groups == 1 or not one_mask_for_all_heads or kwargs.get("position_bias") is not None:
                return original(module, query_BNSH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs)
            # q: (B, N, S, H) -> (B, K, G * S, H), a view: the heads of a group are neighbours
            packed = query_BNSH.reshape(batch, heads // groups, groups * selected, head_dim)
            mask = rows.repeated(attention_mask, groups)
            output, _ = original(_UNGROUPED, packed, key_BKTH, value_BKTH, mask, *args, **kwargs)
            # o: (B, G * S, K, H) -> (B, G, S, K, H) -> (B, S, K, G, H) -> (B, S, N, H)
            output = output.unflatten(1, (groups, selected)).permute(0, 2, 3, 1, 4)
            return output.reshape(batch, selected, heads, -1), None

        return attention

    return replace

