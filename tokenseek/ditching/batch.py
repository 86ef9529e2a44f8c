"""What the first pass of a step that selects runs on: the rows of this process, and what they may attend to.

Shapes: B batch, T tokens, R rows of this process: all B x T, or its share where ranks share a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch

from tokenseek.decoder.attention import Replace, attention_replaced
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import makes_masks_by_utils, whole_masks
from tokenseek.ditching.packing import every_example_alone
from tokenseek.ditching.planned import KnownBatch, targets_of
from tokenseek.ditching.state import Ditching, Sharing
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.selection.batched import Example
from tokenseek.tiling.whole import PackedText, PlainText, TiledPass, tiled_pass
from tokenseek.tiling.window import with_windows
from tokenseek.ulysses.text import DealtText, TextInTiles

# Replaces the attention function in a block, given a `Replace`. Where ranks share a text it takes `on_keys` too, as
# :meth:`tokenseek.ulysses.text.DealtText.attention` does.
Attending: TypeAlias = Callable[..., AbstractContextManager[None]]


class Batch(NamedTuple):
    """What the first pass runs on.

    Attributes:
        targets_BT: the token that each position predicts.
        valid_BT: True but at padding.
        examples: none where the selection is decided already.
        text: where ranks share the examples, which tokens are this rank's.
        tiled: how layers run in tiles, if they do.
        own_targets_BR: of the rows of this process.
        supervised_R: which of these carry a loss; None where the host does not know it.
        arguments: of the model's body, for these rows.
        attention: what attention is replaced by; None for the model's own.
    """

    targets_BT: torch.Tensor
    valid_BT: torch.Tensor
    examples: list[Example]
    text: DealtText | None
    tiled: TiledPass | None
    own_targets_BR: torch.Tensor
    supervised_R: torch.Tensor | None
    arguments: dict[str, Any]
    attention: Attending | None

    @property
    def gathered(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """From this process's rows [B, R, ...] to those of all tokens, where ranks share the examples."""
        return None if self.text is None else self.text.gathered


def batch_of(
    ditching: Ditching,
    arguments: dict[str, Any],
    labels_BT: torch.Tensor,
    selection_keys: torch.Tensor,
    known: KnownBatch | None,
) -> Batch:
    """The rows that this process runs first, of a batch of the model's `arguments` and unshifted `labels_BT`.

    Args:
        known: what the host knows of the batch; None where the selection is decided already.

    Raises:
        UserError: ranks share the texts and cannot deal them, or were given different ones.
    """
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    targets_BT = targets_of(labels_BT, mask)
    valid_BT = torch.ones_like(targets_BT, dtype=torch.bool) if mask is None else mask.bool()
    examples, own_R = (known.examples, known.supervised_R) if known else ([], None)
    alone = _lengths_alone(ditching, examples, len(targets_BT), mask)
    decoder, (batch, tokens) = ditching.decoder, targets_BT.shape
    recomputes = ditching.recomputes(decoder.layers[-1])
    whole = PackedText(alone) if alone else PlainText((batch, tokens))
    is_right_padded = known is None or known.is_right_padded
    if ditching.sequence is None:
        own = _all_rows_arguments(arguments, mask, position_ids, is_right_padded)
        tiled = tiled_pass(decoder, whole, ditching.tile_rows, recomputes)
        attention: Attending | None = None
        if alone:
            attention = partial(_each_alone, decoder, alone)
        elif own.keys().isdisjoint({"attention_mask", "position_ids"}):
            attention = with_windows(decoder, tokens) if tiled else None
            if attention is None and makes_masks_by_utils(decoder):
                attention = partial(_each_row_alone, decoder, tokens)
        if attention is not None:  # with a mask of its own the model does not tell examples apart once more
            own["attention_mask"] = torch.ones_like(targets_BT)
        return Batch(targets_BT, valid_BT, examples, None, tiled, targets_BT, own_R, own, attention)
    text = _dealt(ditching.sequence, decoder, arguments, labels_BT, selection_keys, is_right_padded)
    masked = targets_BT.shape[1], position_ids if mask is None else None
    attention = partial(_each_alone_on_ranks, text, alone) if alone else partial(text.attention, masked=masked)
    tiled = tiled_pass(decoder, TextInTiles(text, whole), ditching.tile_rows, recomputes)
    own_targets_BR = text.mine(targets_BT, IGNORED)
    return Batch(targets_BT, valid_BT, examples, text, tiled, own_targets_BR, None, text.arguments(), attention)


def _lengths_alone(
    ditching: Ditching, examples: list[Example], batch: int, mask: torch.Tensor | None
) -> list[int] | None:
    """Of a packed row, the lengths of its examples, each of which attends alone. None: masks tell examples apart."""
    if mask is not None or len(examples) == batch or batch > 1 or not ditching.attention_is_ours:
        return None
    return [len(example.positions) for example in examples]


@contextmanager
def _each_row_alone(decoder: Decoder, tokens: int, replace: Replace) -> Iterator[None]:
    """In the block, attention is `replace` of that of one example a row, in which nobody looks for several."""
    with whole_masks(decoder, tokens, None, None), attention_replaced(decoder.causal_lm, replace):
        yield


def _each_alone(decoder: Decoder, lengths: list[int], replace: Replace) -> AbstractContextManager[None]:
    """In the block, attention is `replace` of one in which examples of these lengths attend alone."""
    alone = every_example_alone(lengths)
    return _each_row_alone(decoder, max(lengths), lambda original: replace(alone(original)))


def _each_alone_on_ranks(
    text: DealtText, lengths: list[int], replace: Replace, on_keys: Callable[..., None] | None
) -> AbstractContextManager[None]:
    """:func:`_each_alone` of rows that ranks share, each with some of the heads."""
    alone = every_example_alone(lengths)
    return text.attention(lambda original: replace(alone(original)), on_keys, (max(lengths), None))


def _all_rows_arguments(
    arguments: dict[str, Any], mask: torch.Tensor | None, position_ids: torch.Tensor | None, is_right_padded: bool
) -> dict[str, Any]:
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if mask is not None and position_ids is None and is_right_padded:
        # No token looks at padding behind it: causality is all the mask that is needed.
        arguments.pop("attention_mask")
    return {name: value for name, value in arguments.items() if name not in ("use_cache", "return_dict")}


def _dealt(
    sequence: Sharing,
    decoder: Decoder,
    arguments: dict[str, Any],
    labels_BT: torch.Tensor,
    selection_keys: torch.Tensor,
    is_right_padded: bool,
) -> DealtText:
    """The batch, of which each rank of a group runs some tokens in the first pass.

    Raises:
        UserError: on all ranks, for what cannot be dealt, or if they were given different batches.
    """
    input_ids, mask, position_ids = (arguments.get(n) for n in ("input_ids", "attention_mask", "position_ids"))
    if input_ids is None:
        raise UserError("selection under sequence parallelism needs input_ids; inputs_embeds are not dealt to ranks.")
    if not is_right_padded:
        raise UserError("selection under sequence parallelism needs padding on the right.")
    sequence.require_same(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        labels=labels_BT,
        selection_keys=selection_keys,
    )
    return DealtText(decoder, sequence.group, input_ids, position_ids)
