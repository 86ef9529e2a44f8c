"""Several examples in one row: attention stays inside each of them, at the cost of each of them alone.

Examples are told apart by `position_ids` that restart. Transformers does so by a mask of the whole row: attention
then costs the square of all their tokens. Here each example attends by itself, as in a row of its own, and
everything else (norms, projections, MLPs, the head) sees one row without padding.

Shapes: T tokens of the row, M of its longest example, R rows of one pass (selected or unselected), N query heads, K
key/value heads, H head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import nn

from tokenseek.decoder.attention import Attention, Replace, attention_replaced
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import begins_anew, takes_windows, whole_masks
from tokenseek.ditching.reach import BodyCall, PlainReach
from tokenseek.ditching.rows import Partition, partition
from tokenseek.errors import UserError
from tokenseek.tiling.rows import Rows
from tokenseek.tiling.tiles import (
    Extent,
    OfExample,
    PackedTile,
    PlainTile,
    Tile,
    attention_by_example,
    attention_of_rows,
    borders_of_tiles,
    corner,
)
from tokenseek.ulysses.heads import Joining


def reach_by_example(
    decoder: Decoder,
    selected_positions: torch.Tensor,
    position_ids: torch.Tensor,
    attention_is_ours: bool,
    recorded: bool = False,
) -> PlainReach:
    """The reach of a batch without padding, in whose rows `position_ids` [B | 1, T] may tell examples apart.

    Args:
        attention_is_ours: whether each example can attend alone, by an attention function in the place of sdpa's;
            otherwise a mask tells examples apart.
        recorded: the unselected rows have run before; the partition has none.

    Raises:
        UserError: as :func:`tokenseek.ditching.rows.partition` does; for several examples in a row, where the decoder
            takes no position_ids.
    """
    tokens, device = position_ids.shape[-1], selected_positions.device
    # One transfer; what follows is decided on the host.
    joined = torch.cat([selected_positions.flatten(), position_ids.flatten()]).cpu()
    positions_BS = joined[: selected_positions.numel()].view(selected_positions.shape)
    position_ids_BT = joined[selected_positions.numel() :].view(-1, tokens)
    if begins_anew(position_ids_BT).any():
        _require_position_ids(decoder)
    reach = reach_on_host(positions_BS, position_ids_BT, attention_is_ours, recorded)
    if reach is None:
        reach = MaskedReach(partition(positions_BS, None, tokens, recorded), position_ids)
    return reach.to(device, non_blocking=True)


def reach_on_host(
    positions_BS: torch.Tensor, position_ids_BT: torch.Tensor, attention_is_ours: bool, recorded: bool = False
) -> PlainReach | None:
    """As :func:`reach_by_example` of tensors on the host; None where a mask has to tell examples apart."""
    tokens = position_ids_BT.shape[-1]
    parts = partition(positions_BS, None, tokens, recorded)  # and its checks
    is_first_BT = begins_anew(position_ids_BT)
    if not is_first_BT.any():
        return PlainReach(parts)
    if not attention_is_ours or len(positions_BS) > 1 or not parts.selected.valid_BR.any():
        return None
    borders = [0, *is_first_BT[0].nonzero().squeeze(1).tolist(), tokens]
    return PackedReach(_partition_row(positions_BS[0], borders, recorded))


def _partition_row(positions_S: torch.Tensor, borders: list[int], recorded: bool) -> PackedPartition:
    """
    Args:
        positions_S: selected positions in the row, on the host.
        borders: where examples begin, and the row's end.
    """
    positions_S = positions_S[positions_S >= 0]
    examples: list[tuple[Rows, Rows | None] | None] = []
    selected: list[torch.Tensor] = []
    unselected: list[torch.Tensor] = []
    for first, end in pairwise(borders):
        own_1S = positions_S[(positions_S >= first) & (positions_S < end)][None] - first
        if not own_1S.numel():  # no row of this example is seen by a selected one
            examples.append(None)
            continue
        parts = partition(own_1S, None, end - first, recorded)
        selected.append(parts.selected.index_BR + first)
        if parts.unselected is not None:
            unselected.append(parts.unselected.index_BR + first)
        examples.append((parts.selected, parts.unselected))
    return PackedPartition(
        selected=_row(torch.cat(selected, dim=1), borders[-1]),
        unselected=_row(torch.cat(unselected, dim=1), borders[-1]) if unselected else None,
        tokens=borders[-1],
        padded=False,
        right_padded=True,
        lengths=tuple(end - first for first, end in pairwise(borders)),
        examples=tuple(examples),
    )


def _row(index_1R: torch.Tensor, tokens: int) -> Rows:
    """The rows of one pass of all examples."""
    return Rows(index_1R, index_1R[:, :1], tokens, padded=False, leaves_masks=True)


@dataclass(frozen=True)
class PackedPartition(Partition):
    """Of one row of several examples.

    Attributes:
        lengths: tokens of each example.
        examples: selected and unselected rows of each, counted from its first token; None where nothing is selected.
    """

    lengths: tuple[int, ...]
    examples: tuple[tuple[Rows, Rows | None] | None, ...]

    def _moved(self, move: Callable[[Rows], Rows]) -> PackedPartition:
        examples = tuple(None if own is None else _moved_example(own, move) for own in self.examples)
        return replace(super()._moved(move), examples=examples)


def _moved_example(example: tuple[Rows, Rows | None], move: Callable[[Rows], Rows]) -> tuple[Rows, Rows | None]:
    selected, unselected = example
    return move(selected), None if unselected is None else move(unselected)


class MaskedReach(PlainReach):
    """Of rows whose examples a mask of the whole row tells apart: where attention is not sdpa's, or B > 1."""

    def __init__(self, parts: Partition, position_ids_BT: torch.Tensor) -> None:
        super().__init__(parts)
        self.position_ids_BT = position_ids_BT

    def body_call(self, decoder: Decoder, arguments: dict[str, Any]) -> BodyCall:
        # With a mask of its own the model does not tell examples apart once more.
        masks = whole_masks(decoder, self.parts.tokens, None, self.position_ids_BT)
        return arguments | {"attention_mask": self.parts.ones_BT}, masks


class PackedReach(PlainReach):
    """Of one row of several examples, each of which attends alone."""

    parts: PackedPartition

    def body_call(self, decoder: Decoder, arguments: dict[str, Any]) -> BodyCall:
        # Masks are [.., M, M], or None where causality, which the kernels know, is all that they would say.
        masks = whole_masks(decoder, max(self.parts.lengths), None, None, windows=takes_windows(decoder))
        return arguments | {"attention_mask": self.parts.ones_BT}, masks

    def replacement(self, rows: Rows, make: Callable[[Rows], Replace]) -> Replace:
        own, lengths = self._own(rows), self.parts.lengths

        def replace(original: Attention) -> Attention:
            attend = [None if each is None else attention_of_rows(each, make(each)(original)) for each in own]
            return attention_by_example(attend, lengths)

        return replace

    def tiles(self, rows: Rows, size: int) -> Sequence[Tile]:
        return rows.once(f"tiles.{size}", rows.index_BR, lambda: self._make_tiles(rows, size))

    def _make_tiles(self, rows: Rows, size: int) -> list[PackedTile]:
        own = self._own(rows)
        counts = [0 if each is None else each.index_BR.shape[1] for each in own]
        begins = list(accumulate(counts, initial=0))
        tiles = []
        for first, last in borders_of_tiles(begins[-1], size):
            examples = [
                None if each is None else _tile_of_example(each, max(0, first - begin), min(count, last - begin))
                for each, begin, count in zip(own, begins, counts, strict=False)
            ]
            tiles.append(PackedTile(rows.tile(first, last), first, last, examples, self.parts.lengths))
        return tiles

    def _own(self, rows: Rows) -> list[Rows | None]:
        """Of each example its rows in the pass of `rows`."""
        number = 0 if rows is self.parts.selected else 1
        return [None if example is None else example[number] for example in self.parts.examples]

    @contextmanager
    def attention(self, decoder: Decoder, replace: Replace | None, cache: Joining | None) -> Iterator[None]:
        called: list[nn.Module] = []

        def noted(original: Attention) -> Attention:
            attend = original if replace is None else replace(original)

            def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
                called.append(module)
                return attend(module, *args, **kwargs)

            return attention

        with attention_replaced(decoder.causal_lm, noted):
            yield
        if not called:
            raise UserError(
                f"a layer of {decoder.name} computes attention in code of its own and not through Transformers' "
                "AttentionInterface, so that it cannot be kept inside packed examples. Pad them (training.packing: "
                "false)."
            )


def every_example_alone(lengths: Sequence[int]) -> Replace:
    """A replacement for attention over all tokens of one row, in which examples of these lengths attend alone.

    The mask, if any, is that of the longest.
    """

    def replace(original: Attention) -> Attention:
        own = [OfExample(tokens, original, partial(corner, tokens=tokens)) for tokens in lengths]
        return attention_by_example(own, lengths)

    return replace


def _tile_of_example(rows: Rows, first: int, last: int) -> PlainTile | None:
    if first >= last:
        return None
    positions = cast(list[list[int]], rows.on_host)[0]
    extents = [[Extent(0, last - first, positions[first], positions[last - 1])]]
    return PlainTile(rows.tile(first, last), first, last, extents)


class _FirstLayer(Exception):
    pass


def require_packable(decoder: Decoder) -> None:
    """Refuse a model whose attention cannot be kept inside packed examples; its tensors may be without data.

    Raises:
        UserError: it takes no position_ids, or makes its masks itself.
    """
    if decoder.mixers:
        raise UserError(
            f"{decoder.name} carries a state from token to token in {len(decoder.mixers)} of its layers, which would "
            "go on from one packed example to the next. Pad the examples (training.packing: false)."
        )
    _require_position_ids(decoder)
    embeddings: Any = decoder.causal_lm.get_input_embeddings()
    weight = embeddings.weight
    position_ids = torch.arange(2, device=weight.device)[None]

    def stop(*args: Any) -> None:
        raise _FirstLayer

    hook = decoder.layers[0].register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), whole_masks(decoder, 2, None, None), suppress(_FirstLayer):
            decoder.body(
                inputs_embeds=weight.new_zeros(1, 2, weight.shape[-1]),
                attention_mask=torch.ones_like(position_ids),
                position_ids=position_ids,
                use_cache=False,
            )
    finally:
        hook.remove()


def _require_position_ids(decoder: Decoder) -> None:
    if "position_ids" not in inspect.signature(type(decoder.body).forward).parameters:
        raise UserError(
            f"{decoder.name} takes no position_ids, which tell examples in one row apart, so that it cannot be trained "
            "on packed examples. Pad them (training.packing: false)."
        )
