"""Causal attention from some rows to all keys, exact, in memory linear in T: no mask of rows times keys.

Rows ascend, so that they climb a staircase: all rows of a span look at every key before the span's first position.
There the kernels without a mask apply, and a mask is left for the few keys between a span's first position and the next
span's. The two parts of a row's softmax are merged by their log-sum-exps; the backward kernels, which compute
probabilities anew from the log-sum-exp that they are given, are given that of the whole.

The forward pass goes span by span, the backward pass by the keys between two steps, so that gradients of keys and
values are complete at once and only those of the few queries are added up.

Shapes: B batch, T tokens, S rows, N query heads, K key/value heads, G = N / K, H head dim; s rows of a span, R keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from tokenseek.decoder.device import kind_of
from tokenseek.decoder.masks import SlidingWindow, aligned_mask
from tokenseek.tiling.kernels import is_served, require_kernels
from tokenseek.tiling.visits import visited


@dataclass(frozen=True)
class Limits:
    """How a device likes its spans. Where there would be fewer than `fewest` spans, one masked call is faster.

    Attributes:
        rows: that a span has at least.
        keys: that lie between two steps on average, at least.
        most: spans of an example; n of them leave 1 / n of the mask.
    """

    rows: int
    keys: int
    fewest: int
    most: int = 32


# Measured on a CPU (benchmarks/selected_attention.py). On a GPU a launch costs as much as the mask of 256 rows.
LIMITS = {"cpu": Limits(rows=48, keys=256, fewest=4), "cuda": Limits(rows=256, keys=1024, fewest=2)}


# Rows that look at a window of keys: spans cover so many positions at least.
SHORTEST_STRETCH = 256
# Masks of so many entries altogether are made once and kept for all layers; larger ones as spans are visited.
MOST_KEPT_ENTRIES = 2**20


class Span(NamedTuple):
    """Rows [first, last) of an example, the earliest of which is at position `before`, the latest before `keys`.

    Attributes:
        known: the mask [s, R] of its rows at keys [before, keys), to be added to the scores; or, where masks are not
            kept, what it is made of: the positions [s] of its rows.
        window: its rows look at so many keys each, none before `before`, and no later row looks at these keys without a
            mask; None where rows look at all keys up to their own.
    """

    first: int
    last: int
    before: int
    keys: int
    known: torch.Tensor
    window: int | None = None

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[s, R]"""
        if self.known.dim() == 2:
            return self.known
        keys_R = torch.arange(self.before, self.keys, device=self.known.device)
        seen = SlidingWindow(self.keys if self.window is None else self.window).seen
        return aligned_mask(seen(self.known[:, None], keys_R), dtype)


def make_spans(
    positions_BS: Sequence[Sequence[int]], tokens: int, device: torch.device, dtype: torch.dtype
) -> list[list[Span]] | None:
    """The spans of each example; None where there are too few rows or tokens to be worth it.

    Args:
        positions_BS: of the rows, ascending, without those that fill an example up.
        tokens: T.
    """
    limits = LIMITS.get(kind_of(device))
    if limits is None:
        return None
    counts = [min(limits.most, len(positions) // limits.rows, tokens // limits.keys) for positions in positions_BS]
    if max(counts) < limits.fewest:
        return None
    return [
        _spans_of(positions, max(1, count), device, dtype)
        for positions, count in zip(positions_BS, counts, strict=True)
    ]


def _spans_of(positions_S: Sequence[int], count: int, device: torch.device, dtype: torch.dtype) -> list[Span]:
    if not positions_S:
        return []
    rows = [len(positions_S) * i // count for i in range(count + 1)]
    # The first span begins at the first key, where it sees all keys before: none.
    steps = [0, *(positions_S[row] for row in rows[1:-1]), positions_S[-1] + 1]
    position_S = torch.tensor(positions_S).to(device, non_blocking=True)
    spans = [
        Span(first, last, before, keys, position_S[first:last])
        for first, last, before, keys in zip(rows, rows[1:], steps, steps[1:], strict=False)
    ]
    return _kept_masks(spans, dtype)


def _kept_masks(spans: list[Span], dtype: torch.dtype) -> list[Span]:
    """With their masks made, where these are small."""
    if sum((span.last - span.first) * (span.keys - span.before) for span in spans) > MOST_KEPT_ENTRIES:
        return spans
    return [span._replace(known=span.mask(dtype)) for span in spans]


def window_span(first: int, position_s: torch.Tensor, before: int, last: int, window: SlidingWindow) -> Span:
    """The span of consecutive rows from row `first` on, each of which looks at a window of keys.

    Args:
        position_s: of its rows.
        before, last: the first and the last of them, on the host.
    """
    begin = max(0, before - window.size + 1)
    return Span(first, first + len(position_s), begin, last + 1, position_s, window.size)


def make_window_spans(
    positions_BS: Sequence[Sequence[int]], window: SlidingWindow, device: torch.device, dtype: torch.dtype
) -> list[list[Span]]:
    """The spans of each example's rows, each of which looks at a window of keys; stretches about as long as that.

    Args:
        positions_BS: of the rows, ascending, without those that fill an example up.
    """
    spans = []
    for positions_S in positions_BS:
        of_example, first = list[Span](), 0
        position_S = torch.tensor(positions_S, dtype=torch.int64).to(device, non_blocking=True)
        while first < len(positions_S):
            end = bisect_left(positions_S, positions_S[first] + max(window.size, SHORTEST_STRETCH))
            ends = positions_S[first], positions_S[end - 1]
            of_example.append(window_span(first, position_S[first:end], *ends, window))
            first = end
        spans.append(_kept_masks(of_example, dtype))
    return spans


def attention_in_spans(
    query_BNSH: torch.Tensor,
    key_BKTH: torch.Tensor,
    value_BKTH: torch.Tensor,
    spans_of: Callable[[torch.Tensor], Sequence[Sequence[Span]] | None],
    *args: Any,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """:func:`staircase_attention` in the place of a call of an attention function; None where that has to be made.

    It has to where it asks for more than causality or a window, where no kernel serves, and where there are no spans.

    Args:
        spans_of: from the queries as autocast hands them on, to the spans of their rows.
        args, kwargs: what else the attention function was called with.
    """
    if args or dropout or position_bias is not None:
        return None
    query, key, value = _as_autocast(query_BNSH, key_BKTH, value_BKTH)
    if not is_served(query, key, value):
        return None
    spans = spans_of(query)
    return None if spans is None else staircase_attention(query, key, value, spans, scaling)


def _as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As autocast would hand them to ``scaled_dot_product_attention``."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def staircase_attention(
    query_BNSH: torch.Tensor,
    key_BKTH: torch.Tensor,
    value_BKTH: torch.Tensor,
    spans: Sequence[Sequence[Span]],
    scale: float | None = None,
) -> torch.Tensor:
    """[B, S, N, H]: causal attention of S rows; zeros for rows in no span.

    Args:
        spans: of each example, ascending, the first from row 0, each from the row and the position where the one before
            it ends.
        scale: of the scores; 1 / sqrt(H) by default.
    """
    output: torch.Tensor = _Staircase.apply(query_BNSH, key_BKTH, value_BKTH, spans, scale)
    return output


class _Staircase(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BNSH: torch.Tensor,
        key_BKTH: torch.Tensor,
        value_BKTH: torch.Tensor,
        spans: Sequence[Sequence[Span]],
        scale: float | None,
    ) -> torch.Tensor:
        batch, heads, rows, head_dim = query_BNSH.shape
        key_heads = key_BKTH.shape[1]
        unmasked, masked = require_kernels(query_BNSH)
        output_BSNH = query_BNSH.new_zeros(batch, rows, heads, head_dim)
        lse_BNS = query_BNSH.new_zeros(batch, heads, rows, dtype=_lse_dtype(query_BNSH))
        for b, of_example in enumerate(spans):
            query, output = (_grouped(x, key_heads) for x in (query_BNSH[b], output_BSNH[b].transpose(0, 1)))
            key, value = key_BKTH[b], value_BKTH[b]
            lse = _grouped(lse_BNS[b], key_heads)
            for span in visited(of_example):
                first, last, before, keys, _, window = span
                mask = span.mask(query.dtype)
                query_s = query[:, :, first:last]
                near = slice(before, keys)
                out, total = masked.forward(query_s, key[:, near], value[:, near], mask, scale)
                if before and window is None:
                    far, far_lse = unmasked.forward(query_s, key[:, :before], value[:, :before], None, scale)
                    out, total = _merged(out, total, far, far_lse)
                output[:, :, first:last] = out
                lse[:, :, first:last] = total
        # What spans know too, since what a node holds itself lives as long as its output.
        known = [span.known for of_example in spans for span in of_example]
        ctx.save_for_backward(query_BNSH, key_BKTH, value_BKTH, output_BSNH, lse_BNS, *known)
        ctx.borders, ctx.scale = [[(*span[:4], span.window) for span in of_example] for of_example in spans], scale
        return output_BSNH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSNH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BNSH, key_BKTH, value_BKTH, output_BSNH, lse_BNS, *known = ctx.saved_tensors
        of_spans = iter(known)
        key_heads = key_BKTH.shape[1]
        unmasked, masked = require_kernels(query_BNSH)
        dquery_BNSH = torch.zeros_like(query_BNSH)
        dkey_BKTH, dvalue_BKTH = torch.zeros_like(key_BKTH), torch.zeros_like(value_BKTH)
        for b, of_example in enumerate(ctx.borders):
            rows = [query_BNSH[b], output_BSNH[b].transpose(0, 1), grad_BSNH[b].transpose(0, 1), lse_BNS[b]]
            query, output, grad, lse = (_grouped(x, key_heads) for x in rows)
            dquery = _grouped(dquery_BNSH[b], key_heads)
            key, value = key_BKTH[b], value_BKTH[b]
            end = of_example[-1][1] if of_example else 0  # the last row of all
            of_example = [
                Span(first, last, before, keys, next(of_spans), window)
                for first, last, before, keys, window in of_example
            ]
            for span in visited(of_example):
                first, last, before, keys, _, window = span
                mask = span.mask(query.dtype)
                # The keys under this step: the span's own rows see some of them, the rows of all later spans see all.
                near = slice(before, keys)
                for kernel, some, mask_sR in (
                    (masked, slice(first, last), mask),
                    (unmasked, slice(last, end), None),
                ):
                    if some.start == some.stop or (mask_sR is None and window is not None):
                        continue
                    sums = dquery[:, :, some], dkey_BKTH[b, :, near], dvalue_BKTH[b, :, near]
                    given = grad[:, :, some], query[:, :, some], output[:, :, some], lse[:, :, some]
                    kernel.add_gradients(*sums, *given, key[:, near], value[:, near], mask_sR, ctx.scale)
        return dquery_BNSH, dkey_BKTH, dvalue_BKTH, None, None


def _grouped(x_NSH: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[K, G, S, ..]: a view."""
    grouped: torch.Tensor = x_NSH.unflatten(0, (key_heads, -1))
    return grouped


def _merged(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two sets of keys, [K, G, s, H] with its log-sum-exp [K, G, s], from attention to each of them."""
    total = torch.logaddexp(lse, more_lse)
    share, more_share = ((x - total).exp_()[..., None] for x in (lse, more_lse))
    return torch.addcmul(out * share, more, more_share), total


def _lse_dtype(query: torch.Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)
