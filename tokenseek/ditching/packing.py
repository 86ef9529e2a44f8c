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
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tokenseek.decoder.attention import Attention, Replace, attention_replaced
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import begins_anew, whole_masks
from tokenseek.decoder.names import MASK_ARGUMENTS
from tokenseek.ditching.reach import BodyCall, PlainReach
from tokenseek.ditching.rows import Partition, Rows, partition
from tokenseek.errors import UserError
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
        selected=_row(selected, borders[-1]),
        unselected=_row(unselected, borders[-1]) if unselected else None,
        tokens=borders[-1],
        padded=False,
        right_padded=True,
        lengths=tuple(end - first for first, end in pairwise(borders)),
        examples=tuple(examples),
    )


def _row(index_1R: list[torch.Tensor], tokens: int) -> PackedRows:
    index = torch.cat(index_1R, dim=1)
    return PackedRows(index, index[:, :1], tokens, padded=False)


class PackedRows(Rows):
    """The rows of one pass of all examples. Masks are left as they are: each example cuts them by its own rows."""

    def shrink(self, name: str, value: Any, keep_causality: bool = False) -> Any:
        if name.partition(".")[0] in MASK_ARGUMENTS and (value is None or isinstance(value, torch.Tensor)):
            return value
        return super().shrink(name, value, keep_causality)


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
        masks = whole_masks(decoder, max(self.parts.lengths), None, None)
        return arguments | {"attention_mask": self.parts.ones_BT}, masks

    def replacement(self, rows: Rows, make: Callable[[Rows], Replace]) -> Replace:
        is_selected = rows is self.parts.selected
        own = [None if example is None else example[0 if is_selected else 1] for example in self.parts.examples]
        counts, lengths = [0 if rows is None else rows.index_BR.shape[1] for rows in own], self.parts.lengths

        def replace(original: Attention) -> Attention:
            attend = [None if rows is None else make(rows)(original) for rows in own]

            def attention(
                module: nn.Module,
                query_1NRH: torch.Tensor,
                key_1KTH: torch.Tensor,
                value_1KTH: torch.Tensor,
                attention_mask: torch.Tensor | None,
                *args: Any,
                **kwargs: Any,
            ) -> tuple[torch.Tensor, torch.Tensor | None]:
                if kwargs.get("position_bias") is not None:
                    raise UserError("attention with a position_bias cannot be kept inside packed examples; pad them.")
                queries, keys, values = (
                    x.split(sizes, dim=2)
                    for x, sizes in ((query_1NRH, counts), (key_1KTH, lengths), (value_1KTH, lengths))
                )
                outputs = []
                for rows, attend_one, *qkv in zip(own, attend, queries, keys, values, strict=True):
                    if rows is not None and attend_one is not None:
                        mask = _mask_of(rows, attention_mask)
                        outputs.append(attend_one(module, *qkv, mask, *args, **kwargs)[0])
                return torch.cat(outputs, dim=1), None

            return attention

        return replace

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
        def attention(
            module: nn.Module,
            query_1NTH: torch.Tensor,
            key_1KTH: torch.Tensor,
            value_1KTH: torch.Tensor,
            attention_mask: torch.Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            outputs = []
            for qkv in zip(*(x.split(lengths, dim=2) for x in (query_1NTH, key_1KTH, value_1KTH)), strict=True):
                own = qkv[0].shape[2]
                mask = None if attention_mask is None else attention_mask[:, :, :own, :own]
                outputs.append(original(module, *qkv, mask, *args, **kwargs)[0])
            return torch.cat(outputs, dim=1), None

        return attention

    return replace


def _mask_of(rows: Rows, mask_11MM: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of one example's rows [1, 1, rows, its tokens], a corner of that of the longest, once a step."""
    if mask_11MM is None:
        return None
    corner = mask_11MM[:, :, : rows.tokens, : rows.tokens]
    mask: torch.Tensor = rows._once("corner", mask_11MM, lambda: rows.shrink("attention_mask", corner))
    return mask


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
