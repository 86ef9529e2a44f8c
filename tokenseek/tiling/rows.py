"""Some rows (tokens) of each example, and how a layer's arguments shrink to them.

Shapes: B batch, T tokens, R rows, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import torch
from typing_extensions import Self

from tokenseek.decoder.device import kind_of
from tokenseek.decoder.masks import SlidingWindow, aligned_mask
from tokenseek.decoder.names import CACHE_PLACES, KEY_ARGUMENTS, MASK_ARGUMENTS
from tokenseek.errors import UserError

# Every row needs biases over the keys whole, and the caches of both passes ask for no places.
WHOLE_ARGUMENTS = (*KEY_ARGUMENTS, *CACHE_PLACES)

# Under a mask, keys that a span of rows does not see are left out of its attention. Spans of fewer rows are not worth a
# call (on a GPU, a launch), and kernels like numbers of keys that their blocks divide.
MAX_SPANS, MIN_SPAN_ROWS, KEY_BLOCK = 4, {"cpu": 24}, 16
_MIN_SPAN_ROWS = 256


Made = TypeVar("Made")


class Rows:
    """R token positions of each of B examples; where an example has fewer, a position is repeated and marked.

    A repeated row is computed and then dropped: it writes no key or value and carries no loss.

    Args:
        positions_BR: int64, ascending, -1 where the example has no further row.
        fallback_B1: for each example a position whose row stands in where there is none.
        spans: (first row, row behind the last, number of keys): stretches of rows that look at no key behind; made of
            the positions by default.

        leaves_masks: masks are left as they are, as for rows of several examples, each of which cuts them by its own.

    Attributes:
        keeps: what is made of an argument is made once. Not of a tile's rows: all tiles together would hold as much as
            rows that run at once.
        everywhere: where ranks share a text, the rows of all of them, as attention sees them: masks are cut by these.
    """

    keeps = True
    everywhere: Rows | None = None

    def __init__(
        self,
        positions_BR: torch.Tensor,
        fallback_B1: torch.Tensor,
        tokens: int,
        padded: bool,
        spans: Sequence[tuple[int, int, int]] = (),
        leaves_masks: bool = False,
    ) -> None:
        self.tokens = tokens
        self.padded = padded
        self.leaves_masks = leaves_masks
        if spans:
            self.spans = spans
        if padded:
            self.valid_BR = positions_BR >= 0
        self.index_BR = torch.where(self.valid_BR, positions_BR, fallback_B1) if padded else positions_BR
        self._made: dict[str, list[tuple[torch.Tensor, Any]]] = {}

    @cached_property
    def valid_BR(self) -> torch.Tensor:
        """bool: not a repeated row."""
        return torch.ones_like(self.index_BR, dtype=torch.bool)

    @cached_property
    def on_host(self) -> list[list[int]] | None:
        """Of each example its positions, without repeated rows; None where these lie between others.

        The host waits for the device, unless the rows were made there.
        """
        positions_BR = torch.where(self.valid_BR, self.index_BR, -1) if self.padded else self.index_BR
        rows = positions_BR.tolist()
        counts = [sum(position >= 0 for position in row) for row in rows]
        if any(min(row[:count], default=0) < 0 for row, count in zip(rows, counts, strict=True)):
            return None
        return [row[:count] for row, count in zip(rows, counts, strict=True)]

    @cached_property
    def spans(self) -> Sequence[tuple[int, int, int]]:
        """Up to MAX_SPANS spans of equally many rows."""
        rows, positions = self.index_BR.shape[1], self.on_host
        count = max(1, min(MAX_SPANS, rows // MIN_SPAN_ROWS.get(kind_of(self.index_BR.device), _MIN_SPAN_ROWS)))
        borders = [rows * i // count for i in range(count + 1)]
        if self.padded or positions is None:  # a repeated row looks at the tokens up to its example's first
            return [(first, last, self.tokens) for first, last in pairwise(borders)]
        seen = [max(row[border - 1] for row in positions) for border in borders[1:]]
        keys = [min(self.tokens, KEY_BLOCK * (last // KEY_BLOCK + 1)) for last in seen]
        return [(*span, n) for span, n in zip(pairwise(borders), keys, strict=True)]

    def tile(self, first: int, last: int, stretches: int = 1) -> Self:
        """Rows [first, last) of each of so many equal stretches of these rows; they keep nothing."""
        rows = copy(self)
        for name, value in vars(self).items():
            if name in ("index_BR", "valid_BR"):
                rows.__dict__[name] = value.unflatten(1, (stretches, -1))[:, :, first:last].flatten(1)
            elif isinstance(getattr(type(self), name, None), cached_property):  # of all of these rows
                del rows.__dict__[name]
        rows._made, rows.keeps = {}, False
        return rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """These rows on another device, with all that the host knows of them."""
        if self.index_BR.device == torch.device(device):
            return self
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """With what is made of the positions made before, so that no kernel has to."""
        _ = self.on_host, self._slots, self._flat
        moved, once = copy(self.alone), dict[int, torch.Tensor]()
        moved.__dict__.pop("spans", None)  # which differ by device
        for name, value in moved.__dict__.items():
            if isinstance(value, torch.Tensor):
                if id(value) not in once:
                    once[id(value)] = move(value)
                moved.__dict__[name] = once[id(value)]
        return moved

    @cached_property
    def alone(self) -> Self:
        """The same rows without the masks made of them, for nodes of autograd, which outlive a backward pass."""
        _ = self._slots, self._flat
        rows = copy(self)
        rows.__dict__.pop("causal_mask", None)
        rows._made = {}
        return rows

    @cached_property
    def _slots(self) -> torch.Tensor:
        """Row numbers [B * R] in a buffer of B x T rows, or B x (T + 1) where repeated rows go to a spare last one."""
        if not self.padded:
            return self._flat
        position_BR = torch.where(self.valid_BR, self.index_BR, self.tokens)
        return _numbered(position_BR, self.tokens + 1)

    @cached_property
    def _flat(self) -> torch.Tensor:
        """Row numbers [B * R] in a tensor of B x T rows; repeated rows too."""
        return _numbered(self.index_BR, self.tokens)

    def take(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The rows of `x` along its token axis `dim`; the axis before it is the batch, or 1 to be shared."""
        batch, rows = self.index_BR.shape
        if batch == 1:
            return x.index_select(dim, self._flat.to(x.device))
        # One index for all examples: `gather` would read one for every number that it takes.
        is_shared = x.shape[dim - 1] == 1
        index = self.index_BR.flatten() if is_shared else self._flat
        taken = x.flatten(dim - 1, dim).index_select(dim - 1, index.to(x.device))
        by_example: torch.Tensor = taken.unflatten(dim - 1, (batch, rows))
        return by_example

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
        """[B, N, T, H] with these rows at their positions and anything elsewhere."""
        buffer = token_buffer(rows_BNRH, self.tokens, self.padded, torch.Tensor.new_empty)
        self.put(buffer, rows_BNRH)
        return buffer[:, : self.tokens].transpose(1, 2)

    def gradient_of(self, gradient_BNTH: torch.Tensor) -> torch.Tensor:
        """[B, N, R, H]: of these rows, from that of all tokens; zeros for repeated rows."""
        gradient_BNRH = self.take(gradient_BNTH.transpose(1, 2), 1).transpose(1, 2)
        if self.padded:
            gradient_BNRH = gradient_BNRH.masked_fill(~self.valid_BR.to(gradient_BNRH.device)[:, None, :, None], 0)
        return gradient_BNRH

    def packed_mask(
        self, mask_B1RT: torch.Tensor, span: tuple[int, int, int], groups: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """[B, 1, G * rows, keys]: a span of the mask, its rows over and over, to be added to the scores; once a step.

        Attention kernels turn a mask of booleans into such a one, and autograd keeps it, in every layer anew.
        """
        first, last, keys = span

        def make() -> torch.Tensor:
            return aligned_mask(mask_B1RT[:, :, first:last, :keys], dtype, groups)

        return self.once(f"packed.{span}.{groups}.{dtype}", mask_B1RT, make)

    def shrink(self, name: str, value: Any, keep_causality: bool = False) -> Any:
        """A decoder layer's argument `name`, cut down to these rows (once a step, however many layers take it).

        Args:
            keep_causality: leave a missing mask missing, for an attention function that knows these rows; otherwise it
                becomes :attr:`causal_mask`.
        """
        is_mask = name.partition(".")[0] in MASK_ARGUMENTS
        if is_mask and self.everywhere is not None:
            return self.everywhere.shrink(name, value, keep_causality)
        if self.leaves_masks and is_mask and (value is None or isinstance(value, torch.Tensor)):
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self.shrink(f"{name}.{i}", v) for i, v in enumerate(value))
        if (name in MASK_ARGUMENTS and value is None) or isinstance(value, SlidingWindow):
            if keep_causality:
                return value
            if value is None:
                return self.causal_mask if self.keeps else self.window_mask(SlidingWindow(self.tokens))
            return self.window_mask(value)
        if not isinstance(value, torch.Tensor) or name in WHOLE_ARGUMENTS:
            return value
        return self.once(name, value, lambda: self._shrink(name, value))

    def once(self, name: str, source: torch.Tensor, make: Callable[[], Made]) -> Made:
        """What `make` makes of `source`; as it was made before, where the source is the same."""
        if not self.keeps:
            return make()
        known: list[tuple[torch.Tensor, Made]] = self._made.setdefault(name, [])
        for known_source, made in known:
            if known_source is source:
                return made
        # Holding the source keeps its identity from being taken over by another tensor; models alternate between
        # two masks or rotary tables at most, and engines that cast arguments make new ones in every layer.
        del known[:-3]
        new = make()
        known.append((source, new))
        return new

    def _shrink(self, name: str, x: torch.Tensor) -> torch.Tensor:
        batch, tokens = len(self.index_BR), self.tokens
        if name in MASK_ARGUMENTS:
            if x.dim() == 4 and x.shape[2] == tokens:  # [B | 1, N | 1, T, T]: queries are rows, keys stay
                return self.take(x.transpose(0, 1), 2).transpose(0, 1)
            raise UserError(
                f"{name} of shape {tuple(x.shape)} has no axis of {tokens} queries; this model is not supported."
            )
        if x.dim() == 1 and x.shape[0] == tokens and batch == 1:
            return x.index_select(0, self.index_BR[0].to(x.device))
        for dim in range(1, x.dim()):
            if x.shape[dim] == tokens and x.shape[dim - 1] in (1, batch):
                return self.take(x, dim)
        if tokens in x.shape:
            raise UserError(
                f"decoder layer argument {name!r} of shape {tuple(x.shape)}: no telling which axis holds the {tokens} "
                "tokens; this model is not supported."
            )
        return x

    def window_mask(self, window: SlidingWindow) -> torch.Tensor:
        """[B, 1, R, T] bool: what these rows look at under a window, where no kernel knows it."""
        keys = torch.arange(self.tokens, device=self.index_BR.device)
        return window.seen(self.index_BR[:, :, None], keys)[:, None]

    @cached_property
    def causal_mask(self) -> torch.Tensor:
        """[B, 1, R, T] bool: where the model gave no mask it left causality to the kernel, which does not know rows."""
        keys = torch.arange(self.tokens, device=self.index_BR.device)
        return (keys <= self.index_BR[:, :, None])[:, None]


class Stretch(Rows):
    """Consecutive rows [first, last) of every example. What they take of an argument is a view, and not kept."""

    def __init__(
        self,
        first: int,
        last: int,
        shape: tuple[int, int],
        device: torch.device,
        leaves_masks: bool = False,
    ) -> None:
        batch, tokens = shape
        index_BR = torch.arange(first, last, device=device).expand(batch, -1)
        super().__init__(index_BR, index_BR[:, :1], tokens, padded=False, leaves_masks=leaves_masks)
        self.first, self.last = first, last
        self.keeps = False

    def take(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.narrow(dim, self.first, self.last - self.first)


def _numbered(position_BR: torch.Tensor, stride: int) -> torch.Tensor:
    """[B * R]: numbers of rows among B x `stride`."""
    batch = len(position_BR)
    if batch == 1:
        return position_BR[0]
    return (position_BR + stride * torch.arange(batch, device=position_BR.device)[:, None]).flatten()


def token_buffer(like_BNRH: torch.Tensor, tokens: int, padded: bool, make: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[B, T (+ 1), N, H]: token-major, so that a row is one copy; repeated rows go to a spare last one.

    Args:
        make: ``torch.Tensor.new_zeros``, or ``new_empty`` where every row is written or not looked at.
    """
    batch, heads, _, head_dim = like_BNRH.shape
    return make(like_BNRH, (batch, tokens + padded, heads, head_dim))
