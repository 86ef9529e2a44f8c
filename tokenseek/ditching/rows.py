"""Which rows (tokens) of each example run in which pass, and how a layer's arguments shrink to them.

Shapes: B batch, T tokens, R rows of one pass (S selected or U unselected), N heads, H head dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from tokenseek.decoder.attention import attention_replaced, without_cudnn
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import aligned_mask
from tokenseek.decoder.names import CACHE_PLACES, KEY_ARGUMENTS, MASK_ARGUMENTS
from tokenseek.errors import UserError

# Every row needs biases over the keys whole, and the caches of both passes ask for no places.
WHOLE_ARGUMENTS = (*KEY_ARGUMENTS, *CACHE_PLACES)

# Keys that a span of rows does not see are left out of its attention; spans of fewer rows are not worth a call, and
# kernels like numbers of keys that their blocks divide.
MAX_SPANS, MIN_SPAN_ROWS, KEY_BLOCK = 4, 24, 16


class Rows:
    """R token positions of each of B examples; where an example has fewer, a position is repeated and marked.

    A repeated row is computed and then dropped: it writes no key or value and carries no loss.

    Args:
        positions_BR: int64, ascending, -1 where the example has no further row.
        fallback_B1: for each example a position whose row stands in where there is none.
        spans: (first row, row behind the last, number of keys): stretches of rows that look at no key behind.
    """

    def __init__(
        self,
        positions_BR: torch.Tensor,
        fallback_B1: torch.Tensor,
        tokens: int,
        padded: bool,
        spans: Sequence[tuple[int, int, int]] = (),
    ):
        self.tokens = tokens
        self.spans = spans or [(0, positions_BR.shape[1], tokens)]
        self.padded = padded
        self.valid_BR = positions_BR >= 0
        self.index_BR = torch.where(self.valid_BR, positions_BR, fallback_B1) if padded else positions_BR
        self._made: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @cached_property
    def _slots(self) -> torch.Tensor:
        """Row numbers [B * R] in a buffer of B x T rows, or B x (T + 1) where repeated rows go to a spare last one."""
        batch, stride = len(self.index_BR), self.tokens + self.padded
        position_BR = torch.where(self.valid_BR, self.index_BR, self.tokens) if self.padded else self.index_BR
        return (position_BR + stride * torch.arange(batch, device=position_BR.device)[:, None]).flatten()

    def take(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The rows of `x` along its token axis `dim`; the axis before it is the batch, or 1 to be shared."""
        index_BR = self.index_BR.to(x.device)
        if len(index_BR) == 1:
            return x.index_select(dim, index_BR[0])
        x = x.expand(*x.shape[: dim - 1], len(index_BR), *x.shape[dim:])
        index = index_BR.view(*[1] * (dim - 1), *index_BR.shape, *[1] * (x.dim() - dim - 1))
        return x.gather(dim, index.expand(*x.shape[:dim], index_BR.shape[1], *x.shape[dim + 1 :]))

    def put(self, buffer: torch.Tensor, rows_BNRH: torch.Tensor) -> None:
        """Write rows [B, N, R, H] into a token-major `buffer` [B, T (+ 1), N, H], in place."""
        buffer.view(-1, *buffer.shape[2:]).index_copy_(
            0, self._slots.to(buffer.device), rows_BNRH.transpose(1, 2).flatten(0, 1)
        )

    def overwrite(self, whole_BNTH: torch.Tensor, rows_BNRH: torch.Tensor) -> None:
        """Write rows [B, N, R, H] over those in `whole`, in place. Repeated rows write what some real row does."""
        index_BR = self.index_BR.to(whole_BNTH.device)
        if self.padded:
            # Every place is written with one value only, or the order of writing would matter.
            valid_BR = self.valid_BR.to(whole_BNTH.device)
            source_BR = torch.arange(index_BR.shape[1], device=index_BR.device).expand_as(index_BR)
            source_BR = torch.where(valid_BR, source_BR, valid_BR.long().argmax(1, keepdim=True))
            index_BR = index_BR.gather(1, source_BR)
            rows_BNRH = rows_BNRH.gather(2, source_BR[:, None, :, None].expand_as(rows_BNRH))
        if len(index_BR) == 1:
            whole_BNTH.index_copy_(2, index_BR[0], rows_BNRH)
        else:
            batch_B1 = torch.arange(len(index_BR), device=index_BR.device)[:, None]
            whole_BNTH.transpose(1, 2).index_put_((batch_B1, index_BR), rows_BNRH.transpose(1, 2))

    def spread(self, rows_BNRH: torch.Tensor) -> torch.Tensor:
        """[B, N, T, H] with these rows at their positions and zeros elsewhere."""
        buffer = _token_buffer(rows_BNRH, self.tokens, self.padded)
        self.put(buffer, rows_BNRH)
        return buffer[:, : self.tokens].transpose(1, 2)

    def packed_mask(
        self, mask_B1RT: torch.Tensor, span: tuple[int, int, int], groups: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """[B, 1, G * rows, keys]: a span of the mask, its rows over and over, to be added to the scores; once a step.

        Attention kernels turn a mask of booleans into such a one, and autograd keeps it, in every layer anew.
        """
        first, last, keys = span

        def make() -> torch.Tensor:
            return aligned_mask(mask_B1RT[:, :, first:last, :keys], dtype, groups)

        return self._once(f"packed.{span}.{groups}.{dtype}", mask_B1RT, make)

    def shrink(self, name: str, value, keep_causality: bool = False):
        """A decoder layer's argument `name`, cut down to these rows (once a step, however many layers take it).

        Args:
            keep_causality: leave a missing mask missing, for an attention function that knows these rows; otherwise it
                becomes :attr:`causal_mask`.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self.shrink(f"{name}.{i}", v) for i, v in enumerate(value))
        if name in MASK_ARGUMENTS and value is None:
            return None if keep_causality else self.causal_mask
        if not isinstance(value, torch.Tensor) or name in WHOLE_ARGUMENTS:
            return value
        return self._once(name, value, lambda: self._shrink(name, value))

    def _once(self, name: str, source: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        known = self._made.setdefault(name, [])
        for known_source, made in known:
            if known_source is source:
                return made
        # Holding the source keeps its identity from being taken over by another tensor; models alternate between
        # two masks or rotary tables at most, and engines that cast arguments make new ones in every layer.
        del known[:-3]
        known.append((source, make()))
        return known[-1][1]

    def _shrink(self, name: str, x: torch.Tensor) -> torch.Tensor:
        batch, tokens = len(self.index_BR), self.tokens
        if name in MASK_ARGUMENTS:
            if x.dim() == 4 and x.shape[2] == tokens:  # [B | 1, N | 1, T, T]: queries are rows, keys stay
                return self.take(x.transpose(0, 1), 2).transpose(0, 1)
            raise UserError(
                f"{name} of shape {tuple(x.shape)} has no axis of {tokens} queries; this model is not served."
            )
        if x.dim() == 1 and x.shape[0] == tokens and batch == 1:
            return x.index_select(0, self.index_BR[0].to(x.device))
        for dim in range(1, x.dim()):
            if x.shape[dim] == tokens and x.shape[dim - 1] in (1, batch):
                return self.take(x, dim)
        if tokens in x.shape:
            raise UserError(
                f"decoder layer argument {name!r} of shape {tuple(x.shape)}: no telling which axis holds the {tokens} "
                "tokens; this model is not served."
            )
        return x

    @cached_property
    def causal_mask(self) -> torch.Tensor:
        """[B, 1, R, T] bool: where the model gave no mask it left causality to the kernel, which does not know rows."""
        keys = torch.arange(self.tokens, device=self.index_BR.device)
        return (keys <= self.index_BR[:, :, None])[:, None]


def _token_buffer(like_BNRH: torch.Tensor, tokens: int, padded: bool) -> torch.Tensor:
    """Zeros [B, T (+ 1), N, H]: token-major, so that a row is one copy; repeated rows go to a spare last one."""
    batch, heads, _, head_dim = like_BNRH.shape
    return like_BNRH.new_zeros(batch, tokens + padded, heads, head_dim)


@dataclass(frozen=True)
class Partition:
    """The tokens of a batch in two groups: `selected` rows carry gradient, `unselected` rows (None at r = 1) do not.

    Padding tokens are in neither, and cost nothing.

    Attributes:
        right_padded: all padding, if any, is at the end of the examples.
    """

    selected: Rows
    unselected: Rows | None
    tokens: int
    padded: bool
    right_padded: bool

    def assemble(self, unselected_BNUH: torch.Tensor | None, selected_BNSH: torch.Tensor) -> torch.Tensor:
        """Keys or values of all tokens, [B, N, T, H], in the order of the text; gradient reaches the selected rows."""
        buffer = _token_buffer(selected_BNSH, self.tokens, self.padded)
        if unselected_BNUH is not None:
            self.unselected.put(buffer, unselected_BNUH)
        self.selected.put(buffer, selected_BNSH)
        return buffer[:, : self.tokens].transpose(1, 2)

    # What follows is trivial here, and not where ranks share a text (`tokenseek.parallel.sharding`) or a row holds
    # several (`tokenseek.ditching.packing`).

    @property
    def whole(self) -> Partition:
        """The partition that attention sees."""
        return self

    def exchange(self, *rows_BNRH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of one pass, [B, N, R, H], as attention sees them."""
        return rows_BNRH

    def masks(self, decoder: Decoder) -> AbstractContextManager[None]:
        """What the decoder's body, which makes the masks, runs in."""
        return nullcontext()

    def replacement(self, rows: Rows, make: Callable[[Rows], Callable]) -> Callable[[Callable], Callable]:
        """What attention is replaced with in the pass of `rows`, made by `make` of rows of one text."""
        return make(rows)

    def attention(
        self, decoder: Decoder, replace: Callable[[Callable], Callable] | None
    ) -> AbstractContextManager[None]:
        """What one pass of one layer runs in, with attention replaced unless `replace` is None."""
        return without_cudnn() if replace is None else attention_replaced(decoder.causal_lm, replace)

    def enter_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        """`rows` on their way into a layer, but the first."""
        return hidden_BRD

    def leave_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        """`rows` on their way out of a layer, but the last."""
        return hidden_BRD


def partition(
    selected_positions: torch.Tensor, attention_mask: torch.Tensor | None, tokens: int, recorded: bool = False
) -> Partition:
    """Split the tokens of a batch by `selected_positions` [B, S] (int64, ascending, padded with -1).

    Args:
        attention_mask: [B, T], 0 at padding; None where there is none.
        tokens: T.
        recorded: the unselected rows have run before; the partition has none.

    Raises:
        UserError: positions that are not as said above, or that point at padding.
    """
    given = f"selected_positions {list(selected_positions.shape)} ({selected_positions.dtype})"
    if selected_positions.dim() != 2 or selected_positions.dtype != torch.int64:
        raise UserError(f"{given}: expected [B, S] int64, each row ascending and padded with -1 at its end.")
    batch, device = len(selected_positions), selected_positions.device
    if attention_mask is None:
        attention_mask = torch.ones(batch, tokens, device=device)
    if attention_mask.shape != (batch, tokens):
        raise UserError(
            f"{given} do not fit attention_mask {list(attention_mask.shape)}: expected [{batch}, {tokens}]."
        )
    if selected_positions.shape[1] == 0:  # nothing selected anywhere: one dropped row keeps the graph alive
        selected_positions = selected_positions.new_full((batch, 1), -1)

    is_token_BT = attention_mask.to(device=device, dtype=torch.bool)
    chosen_BS = selected_positions >= 0
    clamped_BS = selected_positions.clamp(0, tokens - 1)
    slot_BS = torch.where(chosen_BS, clamped_BS, tokens)
    is_selected_BT = is_token_BT.new_zeros(batch, tokens + 1).scatter_(1, slot_BS, True)[:, :tokens]
    # What comes behind the last selected token is seen by no selected token.
    last_B1 = selected_positions.amax(1, keepdim=True)
    is_needed_BT = torch.arange(tokens, device=device) < last_B1
    is_unselected_BT = is_token_BT & is_needed_BT & ~is_selected_BT
    if recorded:
        is_unselected_BT = torch.zeros_like(is_unselected_BT)
    unselected_B = is_unselected_BT.sum(1)

    ascending_BS = ((selected_positions.diff(dim=1) > 0) & chosen_BS[:, :-1]) | ~chosen_BS[:, 1:]
    facts = [
        (selected_positions < tokens).all(),
        ascending_BS.all() & (selected_positions >= -1).all(),
        (is_token_BT.gather(1, clamped_BS) | ~chosen_BS).all(),
        (is_token_BT[:, :-1] >= is_token_BT[:, 1:]).all(),
        chosen_BS.all(),
        unselected_B.max(),
        unselected_B.min(),
    ]
    borders = _span_borders(selected_positions.shape[1])
    facts += [selected_positions[:, :border].max() for border in borders[1:]]
    # One transfer for everything that the host has to know.
    in_range, ascending, on_tokens, right_padded, all_chosen, longest, shortest, *last_seen = torch.stack(
        [fact.long() for fact in facts]
    ).tolist()
    if not in_range:
        raise UserError(f"{given} hold a position outside the {tokens} tokens given.")
    if not ascending:
        raise UserError(f"{given} are not ascending with -1 at the end; sort each row and pad it with -1.")
    if not on_tokens:
        raise UserError(f"{given} point at padding (attention_mask 0); select real tokens only.")

    padded = not (all_chosen and longest == shortest)
    first_token_B1 = is_token_BT.long().argmax(1, keepdim=True)
    unselected = None
    if longest:
        order_BT = (~is_unselected_BT).long().argsort(dim=1, stable=True)  # the unselected ones first, ascending
        within_BU = torch.arange(longest, device=device) < unselected_B[:, None]
        unselected = Rows(torch.where(within_BU, order_BT[:, :longest], -1), first_token_B1, tokens, padded)
    spans = []
    for first, last, seen in zip(borders, borders[1:], last_seen, strict=False):
        # A repeated row looks at the tokens up to its example's first.
        keys = tokens if padded else min(tokens, KEY_BLOCK * (seen // KEY_BLOCK + 1))
        spans.append((first, last, keys))
    selected = Rows(selected_positions, first_token_B1, tokens, padded, spans)
    return Partition(selected, unselected, tokens, padded, bool(right_padded))


def _span_borders(rows: int) -> list[int]:
    """Where up to MAX_SPANS spans of equally many rows begin, and the end of the last."""
    spans = max(1, min(MAX_SPANS, rows // MIN_SPAN_ROWS))
    return [rows * i // spans for i in range(spans + 1)]
