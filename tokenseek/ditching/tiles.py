"""Which passes of a layer run in tiles (:mod:`tokenseek.tiling.tiles`)."""

from __future__ import annotations

from collections.abc import Sequence

from tokenseek.ditching.reach import Reach
from tokenseek.tiling.tiles import Tile, tile_size


def tiles_of(reach: Reach, tile_rows: int | str, recomputed: bool = False) -> Sequence[Tile] | None:
    """The tiles of the unselected rows, made once a step; None where they run at once.

    Ranks that share a text have as many rows each, and so the same tiles.

    Args:
        recomputed: the selected rows run once more in the backward pass.
    """
    rows = reach.parts.unselected
    if rows is None:
        return None
    batch, count = rows.index_BR.shape
    size = tile_size(tile_rows, batch, count, recomputed)
    return None if size is None else reach.tiles(rows, size)
