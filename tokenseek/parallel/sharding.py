"""One forward pass on the local rows of a sequence: a partition of which this rank holds a part.

Everything between layers, and the layers' norms, projections and MLPs, sees local rows only, as if they were the whole
text, with their positions given explicitly. Two things are counted by the whole text: keys and values, and the masks.
They meet in attention, between the two all-to-alls.

Shapes: B batch, T tokens, P ranks, R rows of one pass on this rank, L slots of all passes on this rank, N heads, H head
dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist

from tokenseek.decoder.attention import Replace
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import whole_masks
from tokenseek.ditching.rows import Partition
from tokenseek.errors import UserError
from tokenseek.tiling.rows import Rows
from tokenseek.tiling.tiles import PlainTile, SharedTile, Tile, borders_of_tiles, extents_of
from tokenseek.ulysses.heads import Joining, heads_exchanged, keys_to_heads
from tokenseek.ulysses.layout import Dealer, Layout, Shards
from tokenseek.ulysses.regroup import Move, plan_move


class LocalRows(Rows):
    """R rows of one pass in their slots among the L local ones; masks are cut by the rows of all ranks.

    Args:
        first_slot: of the pass; its rows follow each other from there.
        everywhere: the rows of this pass on all ranks, in the order of the text.
    """

    everywhere: Rows

    def __init__(self, positions_BR: torch.Tensor, first_slot: int, slots: int, everywhere: Rows) -> None:
        slot_BR = first_slot + torch.arange(positions_BR.shape[1], device=positions_BR.device).expand_as(positions_BR)
        # An empty slot holds a copy of a real token, so it can stand in for itself.
        super().__init__(slot_BR, slot_BR, slots, padded=True)
        self.valid_BR = positions_BR >= 0
        self.everywhere = everywhere


@dataclass(frozen=True)
class LocalPartition(Partition):
    """The rows of one of several ranks that share the text.

    Attributes:
        of_all_ranks: the rows of all ranks, with positions in the text.
        attention_mask_BT, position_ids_BT: of the text, where the model was given them and its masks need them.
        selected_shards, unselected_shards: who holds which of them (unselected: None at r = 1).
        into_layer, out_of_layer: for selected and unselected rows, how they move at a layer's borders; empty where the
            layout is the same between layers as in them.
    """

    of_all_ranks: Partition
    attention_mask_BT: torch.Tensor | None
    position_ids_BT: torch.Tensor | None
    group: dist.ProcessGroup
    query_heads: int
    selected_shards: Shards
    unselected_shards: Shards | None
    into_layer: dict[Rows, Move]
    out_of_layer: dict[Rows, Move]


class SharedReach:
    """Of rows on one of several ranks: all ranks' rows meet in attention, where each rank has some of the heads."""

    joins_in_attention = True

    def __init__(self, parts: LocalPartition) -> None:
        self.parts = parts

    @property
    def whole(self) -> Partition:
        return self.parts.of_all_ranks

    def body_call(self, decoder: Decoder, arguments: dict) -> tuple[dict, AbstractContextManager[None]]:
        # The arguments are cut to local slots already, see `local_arguments`.
        parts = self.parts
        return arguments, whole_masks(decoder, self.whole.tokens, parts.attention_mask_BT, parts.position_ids_BT)

    def replacement(self, rows: Rows, make: Callable[[Rows], Replace]) -> Replace:
        return make(rows)

    def tiles(self, rows: Rows, size: int) -> Sequence[Tile]:
        return rows.once(f"tiles.{size}", rows.index_BR, lambda: self._make_tiles(cast(LocalRows, rows), size))

    def _make_tiles(self, rows: LocalRows, size: int) -> list[SharedTile]:
        ranks, of_all = self.parts.group.size(), rows.everywhere
        borders = borders_of_tiles(rows.index_BR.shape[1], size)
        # In the order in which the all-to-all leaves them.
        if self._interleaved:
            everywhere = [of_all.tile(first * ranks, last * ranks) for first, last in borders]
        else:
            everywhere = [of_all.tile(first, last, stretches=ranks) for first, last in borders]
        tiles = list[SharedTile]()
        for (first, last), whole, extents in zip(borders, everywhere, extents_of(everywhere, ranks), strict=True):
            of_all_ranks = PlainTile(whole, first * ranks, last * ranks, extents)
            tiles.append(SharedTile(rows.tile(first, last), first, last, of_all_ranks))
        return tiles

    def to_attention(self, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = self.parts
        keys, values = keys_to_heads(parts.query_heads, parts.group, self._interleaved, keys_BNRH, values_BNRH)
        return keys, values

    @property
    def _interleaved(self) -> bool:
        return self.parts.selected_shards.interleaved

    def attention(
        self, decoder: Decoder, replace: Replace | None, cache: Joining | None
    ) -> AbstractContextManager[None]:
        return heads_exchanged(decoder, self.parts.group, self._interleaved, replace, cache)

    def enter_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        parts = self.parts
        return parts.into_layer[rows](parts.group, hidden_BRD) if parts.into_layer else hidden_BRD

    def leave_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        parts = self.parts
        return parts.out_of_layer[rows](parts.group, hidden_BRD) if parts.out_of_layer else hidden_BRD


def shard(
    parts: Partition, group: dist.ProcessGroup, query_heads: int, layout: Layout, arguments: dict[str, Any]
) -> LocalPartition:
    """This rank's share of the rows of `parts`, dealt as `layout` says.

    Local slots are the selected rows, then the unselected ones, then one more that is in neither (see
    :func:`local_positions`).

    Args:
        arguments: of the decoder's body, for the whole text.
    """
    deal = partial(_deal, ranks=group.size(), tokens=parts.tokens)
    selected_shards = deal(parts.selected, layout.in_layers)
    unselected_shards = None if parts.unselected is None else deal(parts.unselected, layout.in_layers)
    whole = _of_all_ranks(parts, selected_shards, unselected_shards)

    selected_BR = selected_shards.positions_BPR[:, group.rank()]
    first_unselected = selected_BR.shape[1]
    slots = first_unselected + (unselected_shards.positions_BPR.shape[2] if unselected_shards else 0) + 1
    selected = LocalRows(selected_BR, 0, slots, whole.selected)
    moves = _Moves(group.rank(), deal, layout.between_layers)
    moves.add(selected, selected_shards, parts.selected)
    unselected = None
    if parts.unselected and unselected_shards and whole.unselected:
        unselected_BR = unselected_shards.positions_BPR[:, group.rank()]
        unselected = LocalRows(unselected_BR, first_unselected, slots, whole.unselected)
        moves.add(unselected, unselected_shards, parts.unselected)

    position_ids = arguments.get("position_ids")
    # No token looks at padding behind it: causality is all the mask that is needed.
    causal_alone = parts.right_padded and position_ids is None
    return LocalPartition(
        selected,
        unselected,
        slots,
        True,
        parts.right_padded,
        of_all_ranks=whole,
        attention_mask_BT=None if causal_alone else arguments.get("attention_mask"),
        position_ids_BT=position_ids,
        group=group,
        query_heads=query_heads,
        selected_shards=selected_shards,
        unselected_shards=unselected_shards,
        into_layer=moves.into,
        out_of_layer=moves.out,
    )


def _deal(rows: Rows, dealer: Dealer, ranks: int, tokens: int) -> Shards:
    return dealer(torch.where(rows.valid_BR, rows.index_BR, -1), ranks, tokens)


def _of_all_ranks(parts: Partition, selected_shards: Shards, unselected_shards: Shards | None) -> Partition:
    """The rows as attention sees them: in the order of the text, with the empty slots of all ranks."""
    fallback_B1 = parts.selected.index_BR[:, :1]  # a token, even where nothing is selected

    def everywhere(rows: Rows, shards: Shards) -> Rows:
        positions_BR = shards.in_text_order
        spans = [(0, positions_BR.shape[1], parts.tokens)]
        if shards.interleaved:  # rows are where they were, with empty slots behind the last
            *spans, (first, _, keys) = rows.spans
            spans.append((first, positions_BR.shape[1], keys))
        of_all = Rows(positions_BR, fallback_B1, parts.tokens, True, spans)
        of_all.on_host = rows.on_host if shards.interleaved else None
        return of_all

    return Partition(
        everywhere(parts.selected, selected_shards),
        everywhere(parts.unselected, unselected_shards) if parts.unselected and unselected_shards else None,
        parts.tokens,
        True,
        parts.right_padded,
    )


class _Moves:
    """How rows move at a layer's borders, where the layout is another between layers than in them.

    Args:
        deal: from rows to who holds which of them, by a dealer.
        between_layers: the dealer; None where the layout is the same.

    Attributes:
        into, out: of a layer, by its local rows.
    """

    def __init__(self, rank: int, deal: Callable[[Rows, Dealer], Shards], between_layers: Dealer | None) -> None:
        self._rank, self._deal, self._between_layers = rank, deal, between_layers
        self.into: dict[Rows, Move] = {}
        self.out: dict[Rows, Move] = {}

    def add(self, local: Rows, in_layers: Shards, of_all: Rows) -> None:
        """Plan the moves of `local`, of which `in_layers` tells where `of_all` ranks hold them in a layer."""
        if self._between_layers is not None:
            between_layers = self._deal(of_all, self._between_layers)
            self.into[local] = plan_move(between_layers, in_layers, self._rank)
            self.out[local] = plan_move(in_layers, between_layers, self._rank)


def local_positions(parts: LocalPartition) -> torch.Tensor:
    """[B, L]: the position in the text of every local slot; that of some selected or first token where it is empty.

    The spare last slot holds the end of the text: rotary embeddings that depend on a text's length (longrope, dynamic
    NTK) take the largest position for it, and must come to the same on all ranks and on one process.
    """
    rank = parts.group.rank()
    whole = parts.of_all_ranks
    passes = [(parts.selected_shards, whole.selected), (parts.unselected_shards, whole.unselected)]
    positions = []
    for shards, rows in passes:
        if shards is not None and rows is not None:
            mine_BR = shards.positions_BPR[:, rank]
            # An example without any row of this pass on any rank falls back on the first token.
            positions.append(torch.where(mine_BR >= 0, mine_BR, rows.index_BR[:, :1]))
    batch = len(positions[0])
    positions.append(positions[0].new_full((batch, 1), parts.of_all_ranks.tokens - 1))
    return torch.cat(positions, dim=1)


def local_arguments(arguments: dict, parts: LocalPartition) -> dict:
    """The arguments of the decoder's body, cut to local slots, with explicit `position_ids`.

    Raises:
        UserError: padding that is not on the right without `position_ids`, since models differ in how they count then.
    """
    tokens, positions_BL = parts.of_all_ranks.tokens, local_positions(parts)
    position_ids_BT = arguments.get("position_ids")
    if position_ids_BT is None:
        if not parts.right_padded:
            raise UserError(
                "examples are padded on the left and no position_ids are given. Under sequence parallelism pad on the "
                "right, or give position_ids."
            )
        position_ids_BT = torch.arange(tokens, device=positions_BL.device)[None]
    local = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens:
            index_BL = positions_BL.to(value.device)
            value = value.expand(len(index_BL), *value.shape[1:])
            index = index_BL.view(*index_BL.shape, *[1] * (value.dim() - 2))
            value = value.gather(1, index.expand(*index_BL.shape, *value.shape[2:]))
        local[name] = value
    position_ids_BT = position_ids_BT.to(positions_BL.device).expand(len(positions_BL), -1)
    local["position_ids"] = position_ids_BT.gather(1, positions_BL)
    local["position_ids"][:, -1] = position_ids_BT.amax(1)
    # Every slot holds a token; what is padding in the text is known to `whole` and to the masks of `whole_masks`.
    local["attention_mask"] = torch.ones_like(positions_BL)
    return local
