"""Rows of a layer in tiles, where they are many: nothing of them is kept, so nothing need be held whole.

Two sweeps run the layer's own code. The first leaves each tile at its keys and values, which are written into buffers;
the second takes each tile through attention to all keys, the output projection and the feed-forward layers. What a
layer holds besides hidden states, keys and values is that of one tile, experts included. Queries, keys and values are
projected in both sweeps.

Shapes: B batch, T tokens, U rows of the pass, R rows of a tile, D hidden, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.functional import pad

from tokenseek.decoder.attention import Attention, Replace
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import SlidingWindow
from tokenseek.errors import UserError
from tokenseek.tiling.cache import KeysAndValuesSeen, OnceCache, ProjectedCache, WholeCache
from tokenseek.tiling.rows import Rows
from tokenseek.tiling.staircase import Span, attention_in_spans, window_span
from tokenseek.tiling.visits import visited

# With "auto", tiles have so many rows, and there are none where fewer than twice as many rows run: a second projection
# is then not worth what it saves.
AUTO_ROWS = 2048
# Who recomputes asks for memory: there tiles are smaller, and begin with fewer rows.
AUTO_ROWS_RECOMPUTED = 768


def require_tile_rows(tile_rows: int | str) -> None:
    """Raise UserError unless it is "auto" or a number of rows."""
    if tile_rows != "auto" and (isinstance(tile_rows, bool) or not isinstance(tile_rows, int) or tile_rows < 1):
        raise UserError(f"tile_rows is {tile_rows!r}; it must be 'auto' or a number of rows, at least 1.")


def tile_size(tile_rows: int | str, batch: int, count: int, recomputed: bool = False) -> int | None:
    """Rows of a tile in each of `batch` examples of `count` rows; None where these run at once.

    Args:
        recomputed: the step recomputes activations.
    """
    size = tile_rows if isinstance(tile_rows, int) else AUTO_ROWS_RECOMPUTED if recomputed else AUTO_ROWS
    size = max(1, size // batch)
    if count <= size or (tile_rows == "auto" and count < (1.5 if recomputed else 2) * size):
        return None
    return size


def borders_of_tiles(count: int, size: int) -> list[tuple[int, int]]:
    """[first, last) of tiles of about equally many rows, at most `size`."""
    number = -(-count // size)
    return list(pairwise(count * i // number for i in range(number + 1)))


class Tile(Protocol):
    """Consecutive rows [first, last) of a pass.

    Attributes:
        rows: what a layer's arguments shrink to.
    """

    first: int
    last: int
    rows: Rows

    def attention(self, on_call: Callable[[], None]) -> Replace:
        """What replaces attention (see :func:`tokenseek.decoder.attention.attention_replaced`) for these rows."""


class Extent(NamedTuple):
    """Some rows of a tile that ascend in the text.

    Attributes:
        row: the first of them.
        rows: how many they are.
        before, last: positions of the first and the last of them.
    """

    row: int
    rows: int
    before: int
    last: int


class PlainTile:
    """Of rows whose keys are where attention looks for them.

    Args:
        extents: of each example, its rows here.
    """

    def __init__(self, rows: Rows, first: int, last: int, extents: Sequence[Sequence[Extent]]) -> None:
        self.rows, self.first, self.last, self.extents = rows, first, last, extents

    def spans(self, device: torch.device, window: SlidingWindow | None) -> list[list[Span]]:
        """Of each example one for each extent, whose mask is of the keys between its rows, or in its window.

        It is made as it is attended to: those of all tiles together would be as long as the text.
        """
        spans: list[list[Span]] = []
        for of_example, index_R in zip(self.extents, self.rows.index_BR, strict=True):
            spans.append([])
            for row, rows, before, last in of_example:
                position_s = index_R[row : row + rows].to(device)
                if window is not None:
                    spans[-1].append(window_span(row, position_s, before, last, window))
                else:
                    spans[-1].append(Span(row, row + rows, before, last + 1, position_s))
        return spans

    def attention(self, on_call: Callable[[], None]) -> Replace:
        """Where the mask is plain causality (None), all keys before the tile's first row are attended to without a
        mask, and a mask is made of the keys between its rows alone; of a window, of the keys in it."""

        def replace(original: Attention) -> Attention:
            def attention(
                module: nn.Module,
                query_BNRH: torch.Tensor,
                key_BKTH: torch.Tensor,
                value_BKTH: torch.Tensor,
                attention_mask: torch.Tensor | SlidingWindow | None,
                *args: Any,
                **kwargs: Any,
            ) -> tuple[torch.Tensor, torch.Tensor | None]:
                on_call()
                if attention_mask is None or isinstance(attention_mask, SlidingWindow):
                    window = attention_mask
                    output = attention_in_spans(
                        query_BNRH,
                        key_BKTH,
                        value_BKTH,
                        lambda query: self.spans(query.device, window),
                        *args,
                        **kwargs,
                    )
                    if output is not None:
                        return output, None
                    # Of one tile, and not kept.
                    attention_mask = self.rows.window_mask(window or SlidingWindow(self.rows.tokens))
                return original(module, query_BNRH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs)

            return attention

        return replace


class SharedTile:
    """Of rows on one of several ranks, between whose rows and heads are exchanged around attention.

    Args:
        rows: of this rank.
        everywhere: the same tile of all ranks, as attention sees it.
        empty: how many slots of all ranks are behind its last row.
    """

    def __init__(self, rows: Rows, first: int, last: int, everywhere: Tile, empty: int = 0) -> None:
        self.rows, self.first, self.last, self.everywhere, self.empty = rows, first, last, everywhere, empty
        rows.everywhere = everywhere.rows

    def attention(self, on_call: Callable[[], None]) -> Replace:
        replace = self.everywhere.attention(on_call)
        return (lambda original: of_first_rows(replace(original), self.empty)) if self.empty else replace


def of_first_rows(attend: Attention, empty: int) -> Attention:
    """`attend` of queries, the last `empty` of which are of no token; its output is zero there."""

    def attention(
        module: nn.Module, query_BNRH: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output_BRNH, weights = attend(module, query_BNRH[:, :, : query_BNRH.shape[2] - empty], *args, **kwargs)
        return pad(output_BRNH, (0, 0, 0, 0, 0, empty)), weights

    return attention


class PackedTile:
    """Of one row of several examples, each of which attends alone.

    Args:
        examples: of each, its rows here, counted from its first token; None where it has none.
        lengths: tokens of each example.
    """

    def __init__(
        self, rows: Rows, first: int, last: int, examples: Sequence[PlainTile | None], lengths: Sequence[int]
    ) -> None:
        self.rows, self.first, self.last, self.examples, self.lengths = rows, first, last, examples, lengths

    def attention(self, on_call: Callable[[], None]) -> Replace:
        """The mask, if any, is that of the longest example."""

        def replace(original: Attention) -> Attention:
            own = [
                None if tile is None else attention_of_rows(tile.rows, tile.attention(on_call)(original))
                for tile in self.examples
            ]
            return attention_by_example(own, self.lengths)

        return replace


class OfExample(NamedTuple):
    """How one of several examples in a row attends.

    Attributes:
        rows: how many it has.
        attend: their attention function.
        mask_of: from the mask of the longest example, if there is one, to theirs.
    """

    rows: int
    attend: Attention
    mask_of: Callable[[torch.Tensor], torch.Tensor]


def attention_of_rows(rows: Rows, attend: Attention) -> OfExample:
    """Of `rows`, counted from the example's first token; their mask is cut once a step."""

    def mask_of(mask_11MM: torch.Tensor) -> torch.Tensor:
        mask: torch.Tensor = rows.once(
            "corner", mask_11MM, lambda: rows.shrink("attention_mask", corner(mask_11MM, rows.tokens))
        )
        return mask

    return OfExample(rows.index_BR.shape[1], attend, mask_of)


def corner(mask_11MM: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mask of an example of so many tokens, cut from that of the longest."""
    return mask_11MM[:, :, :tokens, :tokens]


def attention_by_example(own: Sequence[OfExample | None], lengths: Sequence[int]) -> Attention:
    """Attention of the rows of several examples in one row, each of which attends alone.

    Args:
        own: of each example; None where it has no rows.
        lengths: tokens of each example. The mask, if any, is that of the longest.
    """
    counts = [0 if each is None else each.rows for each in own]

    def attention(
        module: nn.Module,
        query_1NRH: torch.Tensor,
        key_1KTH: torch.Tensor,
        value_1KTH: torch.Tensor,
        attention_mask: torch.Tensor | SlidingWindow | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if kwargs.get("position_bias") is not None:
            raise UserError("attention with a position_bias cannot be kept inside packed examples; pad them.")
        queries, keys, values = (
            x.split(list(sizes), dim=2)
            for x, sizes in ((query_1NRH, counts), (key_1KTH, lengths), (value_1KTH, lengths))
        )
        outputs = []
        for each, *qkv in zip(own, queries, keys, values, strict=True):
            if each is not None:
                mask = each.mask_of(attention_mask) if isinstance(attention_mask, torch.Tensor) else attention_mask
                outputs.append(each.attend(module, *qkv, mask, *args, **kwargs)[0])
        return torch.cat(outputs, dim=1), None

    return attention


class TiledLayer:
    """One layer's pass over rows without gradient, in tiles.

    Attributes:
        attended: whether the layer looked its attention function up and found ours.
        keeps_input: the hidden states are needed later; :meth:`finish` writes to memory of its own.

    Args:
        run: takes hidden states [B, R, D], :class:`Rows`, a cache and a replacement for attention; returns the output
            [B, R, D] of the layer.
        hidden_BUD: of all rows of the pass; written over by :meth:`finish` unless it is kept.
    """

    def __init__(
        self,
        layer: nn.Module,
        decoder: Decoder,
        tiles: Sequence[Tile],
        hidden_BUD: torch.Tensor,
        run: Callable[..., Any],
    ) -> None:
        self.layer, self.decoder, self.tiles, self.hidden_BUD, self.run = layer, decoder, tiles, hidden_BUD, run
        self.attended = self.keeps_input = False

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, U, H], by the first sweep."""
        buffers: list[torch.Tensor] = []
        for tile in visited(self.tiles):
            cache = ProjectedCache()
            with suppress(KeysAndValuesSeen):
                self.run(self._rows_of(tile), tile.rows, cache, lambda original: original)
            for i, rows in enumerate(cache.given_by(self.layer, self.decoder)):
                if len(buffers) <= i:
                    count = self.hidden_BUD.shape[1]
                    # Token-major, as a projection leaves them.
                    buffers.append(rows.new_empty(len(rows), count, rows.shape[1], rows.shape[3]).transpose(1, 2))
                buffers[i][:, :, tile.first : tile.last] = rows
        return buffers[0], buffers[1]

    def finish(self, keys_BKTH: torch.Tensor | None = None, values_BKTH: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output for all rows, [B, U, D], by the second sweep.

        Args:
            keys_BKTH, values_BKTH: None in a layer that takes over those of another.
        """
        output_BUD = torch.empty_like(self.hidden_BUD) if self.keeps_input else self.hidden_BUD
        for tile in visited(self.tiles):
            cache: OnceCache | None = None
            if keys_BKTH is not None and values_BKTH is not None:
                cache = WholeCache(keys_BKTH.detach(), values_BKTH.detach())
            output_BRD = self.run(self._rows_of(tile), tile.rows, cache, tile.attention(self._note_attention))
            if output_BRD.dtype != output_BUD.dtype:
                output_BUD = torch.empty_like(self.hidden_BUD, dtype=output_BRD.dtype)
            output_BUD[:, tile.first : tile.last] = output_BRD
        return output_BUD

    def _rows_of(self, tile: Tile) -> torch.Tensor:
        return self.hidden_BUD[:, tile.first : tile.last]

    def _note_attention(self) -> None:
        self.attended = True


def plain_tiles(rows: Rows, size: int) -> list[PlainTile]:
    """The tiles of rows that ascend in the text, made once a step."""
    return rows.once(f"tiles.{size}", rows.index_BR, lambda: _make_plain_tiles(rows, size))


def _make_plain_tiles(rows: Rows, size: int) -> list[PlainTile]:
    borders = borders_of_tiles(rows.index_BR.shape[1], size)
    tiles = [rows.tile(first, last) for first, last in borders]
    return [
        PlainTile(own, *ends, extents) for own, ends, extents in zip(tiles, borders, extents_of(tiles), strict=True)
    ]


def extents_of(tiles: Sequence[Rows], stretches: int = 1) -> list[list[list[Extent]]]:
    """Of each tile, by example, the extents of its rows.

    Args:
        tiles: the rows of each: so many equal stretches of rows that ascend, repeated ones behind.
    """
    ends = []
    for rows in tiles:
        positions_BR = torch.where(rows.valid_BR, rows.index_BR, -1) if rows.padded else rows.index_BR
        positions_BPR = positions_BR.unflatten(1, (stretches, -1))
        count_BP = (positions_BPR >= 0).sum(2)
        ends.append(torch.stack([count_BP, positions_BPR[:, :, 0], positions_BPR.amax(2)], dim=2))
    found = []
    for rows, of_tile in zip(tiles, torch.stack(ends).tolist(), strict=True):  # one transfer
        slots = rows.index_BR.shape[1] // stretches
        found.append([[Extent(n * slots, *own) for n, own in enumerate(of_one) if own[0]] for of_one in of_tile])
    return found
