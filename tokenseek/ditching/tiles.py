"""The unselected rows of a layer in tiles, where they are many: nothing of them is kept, so nothing need be held whole.

Two sweeps run the layer's own code. The first leaves each tile at its keys and values, which are written into buffers;
then the selected rows run; the second sweep takes each tile through attention to all keys, the output projection and
the feed-forward layers, and writes its hidden states over those that it came with. What a layer holds besides hidden
states, keys and values is that of one tile, experts included. Queries, keys and values are projected in both sweeps.

Shapes: B batch, T tokens, U unselected, R rows of a tile, D hidden, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tokenseek.decoder.attention import Attention, Replace
from tokenseek.decoder.find import Decoder
from tokenseek.ditching.cache import KeysAndValuesSeen, OnceCache
from tokenseek.ditching.reach import PlainReach, Reach
from tokenseek.ditching.rows import Rows
from tokenseek.ditching.staircase import Span, is_served, staircase_attention
from tokenseek.ditching.visits import visited
from tokenseek.errors import UserError

# With "auto", tiles have so many rows, and there are none where fewer than twice as many rows run: a second projection
# is then not worth what it saves.
AUTO_ROWS = 2048
# Who recomputes asks for memory: there tiles are smaller, and begin with fewer rows.
AUTO_ROWS_RECOMPUTED = 768


def require_tile_rows(tile_rows: int | str) -> None:
    """Raise UserError unless it is "auto" or a number of rows."""
    if tile_rows != "auto" and (isinstance(tile_rows, bool) or not isinstance(tile_rows, int) or tile_rows < 1):
        raise UserError(f"tile_rows is {tile_rows!r}; it must be 'auto' or a number of rows, at least 1.")


class Tile:
    """Consecutive unselected rows [first, last) of every example.

    Args:
        extents: of each example, how many rows it has here, and the positions of the first and the last of them.
    """

    def __init__(self, rows: Rows, first: int, last: int, extents: list[list[int]]) -> None:
        self.first, self.last, self.extents = first, last, extents
        here = slice(first, last)
        positions_BR = torch.where(rows.valid_BR[:, here], rows.index_BR[:, here], -1)
        fallback_B1 = rows.index_BR[:, :1]  # some row of the example
        # What is made for all tiles of a text would be as large as what is made for the whole.
        self.rows = Rows(positions_BR, fallback_B1, rows.tokens, rows.padded, keeps=False)

    def take(self, hidden_BUD: torch.Tensor) -> torch.Tensor:
        return hidden_BUD[:, self.first : self.last]

    def spans(self, device: torch.device) -> list[list[Span]]:
        """Of each example one, whose mask is of the keys between its rows and is made as it is attended to."""
        return [
            [Span(0, count, before, last + 1, index_R[:count].to(device))] if count else []
            for (count, before, last), index_R in zip(self.extents, self.rows.index_BR, strict=True)
        ]


def tiles_of(reach: Reach, tile_rows: int | str, recomputed: bool = False) -> list[Tile] | None:
    """The tiles of the unselected rows, made once a step; None where they run at once.

    Args:
        recomputed: the selected rows run once more in the backward pass.

    Where ranks share a text, or a row holds several examples, attention knows rows in another order.
    """
    parts = reach.parts
    if type(reach) is not PlainReach or parts.unselected is None:
        return None
    batch, count = parts.unselected.index_BR.shape
    most = tile_rows if isinstance(tile_rows, int) else AUTO_ROWS_RECOMPUTED if recomputed else AUTO_ROWS
    size = max(1, most // batch)
    if count <= size or (tile_rows == "auto" and count < (1.5 if recomputed else 2) * size):
        return None
    rows = parts.unselected
    return rows._once(f"tiles.{size}", rows.index_BR, lambda: _make_tiles(rows, size))


def _make_tiles(rows: Rows, size: int) -> list[Tile]:
    count = rows.index_BR.shape[1]
    number = -(-count // size)
    borders = [count * i // number for i in range(number + 1)]
    # Valid rows come first: the last one of a tile is that before its first repeated one.
    valid_B = rows.valid_BR.sum(1)
    extents: list[torch.Tensor] = []
    for first, last in pairwise(borders):
        here_B = (valid_B - first).clamp(0, last - first)
        end_B1 = (first + here_B - 1).clamp(min=first)[:, None]
        ends = rows.index_BR[:, first], rows.index_BR.gather(1, end_B1)[:, 0]
        extents.append(torch.stack([here_B, *ends], dim=1))
    on_host = torch.stack(extents).tolist()  # one transfer
    return [Tile(rows, first, last, own) for (first, last), own in zip(pairwise(borders), on_host, strict=True)]


class ProjectedCache(OnceCache):
    """Ends a tile's first sweep at its keys and values [B, K, R, H]."""

    def _update(self, keys_BKRH: torch.Tensor, values_BKRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._record(keys_BKRH, values_BKRH)
        raise KeysAndValuesSeen


class WholeCache(OnceCache):
    """Returns keys and values of all tokens, [B, K, T, H], for a tile's second sweep."""

    def __init__(self, keys_BKTH: torch.Tensor, values_BKTH: torch.Tensor) -> None:
        super().__init__()
        self._whole = keys_BKTH, values_BKTH

    def _update(self, keys_BKRH: torch.Tensor, values_BKRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._record(*self._whole)


class TiledLayer:
    """One layer's pass over the unselected rows, in tiles.

    Attributes:
        attended: whether the layer looked its attention function up and found ours.
        keeps_input: the hidden states are needed later; :meth:`finish` writes to memory of its own.

    Args:
        run: takes hidden states [B, R, D], :class:`Rows`, a cache and a replacement for attention; returns the output
            [B, R, D] of the layer.
        hidden_BUD: of all unselected rows; written over by :meth:`finish` unless it is kept.
    """

    def __init__(
        self, layer: nn.Module, decoder: Decoder, tiles: list[Tile], hidden_BUD: torch.Tensor, run: Callable[..., Any]
    ) -> None:
        self.layer, self.decoder, self.tiles, self.hidden_BUD, self.run = layer, decoder, tiles, hidden_BUD, run
        self.attended = self.keeps_input = False

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, U, H], by the first sweep."""
        buffers: list[torch.Tensor] = []
        for tile in visited(self.tiles):
            cache = ProjectedCache()
            with suppress(KeysAndValuesSeen):
                self.run(tile.take(self.hidden_BUD), tile.rows, cache, lambda original: original)
            for i, rows in enumerate(cache.given_by(self.layer, self.decoder)):
                if len(buffers) <= i:
                    count = self.hidden_BUD.shape[1]
                    # Token-major, as a projection leaves them.
                    buffers.append(rows.new_empty(len(rows), count, rows.shape[1], rows.shape[3]).transpose(1, 2))
                buffers[i][:, :, tile.first : tile.last] = rows
        return buffers[0], buffers[1]

    def finish(self, keys_BKTH: torch.Tensor, values_BKTH: torch.Tensor) -> torch.Tensor:
        """The layer's output for all unselected rows, [B, U, D], by the second sweep."""
        output_BUD = torch.empty_like(self.hidden_BUD) if self.keeps_input else self.hidden_BUD
        for tile in visited(self.tiles):
            cache = WholeCache(keys_BKTH.detach(), values_BKTH.detach())
            replace = tile_attention(tile, self._note_attention)
            output_BRD = self.run(tile.take(self.hidden_BUD), tile.rows, cache, replace)
            if output_BRD.dtype != output_BUD.dtype:
                output_BUD = torch.empty_like(self.hidden_BUD, dtype=output_BRD.dtype)
            output_BUD[:, tile.first : tile.last] = output_BRD
        return output_BUD

    def _note_attention(self) -> None:
        self.attended = True


def tile_attention(tile: Tile, on_call: Callable[[], None]) -> Replace:
    """A replacement (see :func:`tokenseek.decoder.attention.attention_replaced`) for attention of a tile's rows.

    Where the mask is plain causality (None), all keys before the tile's first row are attended to without a mask, and a
    mask is made of the keys between its rows alone.
    """

    def replace(original: Attention) -> Attention:
        def attention(
            module: nn.Module,
            query_BNRH: torch.Tensor,
            key_BKTH: torch.Tensor,
            value_BKTH: torch.Tensor,
            attention_mask: torch.Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            on_call()
            if attention_mask is None:
                plain = not args and not kwargs.get("dropout") and kwargs.get("position_bias") is None
                if plain and is_served(query_BNRH, key_BKTH, value_BKTH):
                    spans = tile.spans(query_BNRH.device)
                    return staircase_attention(query_BNRH, key_BKTH, value_BKTH, spans, kwargs.get("scaling")), None
                keys_T = torch.arange(tile.rows.tokens, device=query_BNRH.device)
                attention_mask = (keys_T <= tile.rows.index_BR[:, :, None])[:, None]  # of one tile, and not kept
            return original(module, query_BNRH, key_BKTH, value_BKTH, attention_mask, *args, **kwargs)

        return attention

    return replace
