"""The loss of all tokens without gradient, in memory that long examples do not fill.

Layers run in tiles, and the head in chunks of rows.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenseek.decoder.find import Decoder, find_causal_lm, find_decoder, forward_replaced
from tokenseek.decoder.head import next_token_labels
from tokenseek.ditching import ditching_of
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.parallel import shared_by
from tokenseek.seeking.gradient import head_scores
from tokenseek.tiling.whole import PlainText, layers_in_tiles, tiled_pass


def _evaluated_decoder(model: nn.Module) -> Decoder | None:
    """The decoder of a model whose loss :func:`loss_in_pieces` computes; None where the model has to do so itself.

    It has to where ranks share a text, where its loss is another than the cross-entropy of the next token, and where
    its layers are not those of a decoder that token ditching serves.
    """
    if shared_by(model) is not None or find_causal_lm(model).loss_function is not ForCausalLMLoss:
        return None
    try:
        return find_decoder(model)
    except UserError:  # ordinary training takes it, and so does its own loss
        return None


@contextmanager
def loss_in_pieces(
    model: nn.Module, shape: tuple[int, int], casting: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """In the block, calls of `model` with labels of `shape` [B, T] return the loss alone, if T is large.

    Args:
        casting: what the model runs in, under mixed precision.
    """
    decoder, ditching, text = _evaluated_decoder(model), ditching_of(model), PlainText(shape)
    tile_rows = ditching.tile_rows if ditching else "auto"
    if decoder is None or tiled_pass(decoder, text, tile_rows) is None:
        yield
        return
    with (
        layers_in_tiles(decoder, text, tile_rows),
        forward_replaced(decoder.causal_lm, partial(_loss, decoder, casting)),
    ):
        yield


def _loss(
    decoder: Decoder,
    casting: Callable[[], AbstractContextManager[Any]],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    use_cache: bool = False,
    **arguments: Any,
) -> CausalLMOutputWithPast:
    with casting():
        output = decoder.body(**arguments, use_cache=False, return_dict=True)
        targets_BT = next_token_labels(labels)
        losses_BT = cast(torch.Tensor, head_scores(decoder, output, targets_BT, losses=True).losses)
    items = targets_BT.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithPast(loss=losses_BT.sum() / items)
