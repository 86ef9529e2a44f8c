"""Context importance, Eq. 3: how much attention a token receives in the last layer. The attention map is never built.

Where layers without attention are above it, that is the last layer that attends.

With A the attention map of one head, the output is A V. Its vector-Jacobian product with respect to V is A^T C for a
cotangent C, so the backward pass of the attention kernel, which is fused and needs memory linear in T, sums the columns
of A. Nothing else is known of the attention: windows, soft-caps, sinks and grouped heads are in A already.

Shapes: B batch, T tokens, N query heads, K key/value heads, H channels of a value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from tokenseek.decoder.attention import Attention, Replace, attention_replaced
from tokenseek.decoder.find import Decoder
from tokenseek.errors import UserError


@contextmanager
def attention_received(
    decoder: Decoder,
    valid_BT: torch.Tensor,
    replaced: Callable[[Replace], AbstractContextManager[None]] | None = None,
) -> Iterator[list[torch.Tensor]]:
    """Records Eq. 3, I1[j] = sum_i A[i, j] averaged over the heads of the last layer, from a forward pass in the block.

    Gradients must be enabled while the last layer runs. Its output and its own gradients are unchanged.

    Args:
        valid_BT: True at tokens, False at padding; rows of A at padding do not count.
        replaced: replaces the attention function by one that attends from all T tokens, if the model's own alone does
            not: where ranks share a text (:meth:`tokenseek.ulysses.text.DealtText.attention`). Heads are then those
            of one rank.

    Yields:
        A list that holds the scores [B, T], at least float32, once the last layer has run.

    Raises:
        UserError: on leaving the block, if the last layer computed its attention in code of its own.
    """
    attention_modules = set(last_attending(decoder).modules())
    received: list[torch.Tensor] = []

    def replace(original: Attention) -> Attention:
        def attention(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value_BKTH: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if module not in attention_modules:
                return original(module, query, key, value_BKTH, *args, **kwargs)
            if value_BKTH.requires_grad:
                output_BTNH, weights = original(module, query, key, value_BKTH, *args, **kwargs)
                received.append(_column_sums(output_BTNH, value_BKTH, valid_BT))
                return output_BTNH, weights
            # Values that the last layer takes over from an earlier one, or layers without attention above.
            leaf_BKTH = value_BKTH.detach().requires_grad_()
            with torch.enable_grad():
                output_BTNH, weights = original(module, query, key, leaf_BKTH, *args, **kwargs)
                received.append(_column_sums(output_BTNH, leaf_BKTH, valid_BT))
            return (output_BTNH if query.requires_grad else output_BTNH.detach()), weights

        return attention

    with replaced(replace) if replaced else attention_replaced(decoder.causal_lm, replace):
        yield received
    if not received:
        raise UserError(
            f"{decoder.name} (model type {decoder.causal_lm.config.model_type!r}) computes the attention of its last "
            "layer in code of its own and not through Transformers' AttentionInterface, so the attention that its "
            "tokens receive (Eq. 3) cannot be read. Use a model that does, as Llama, Qwen, Mistral, Gemma, Phi-3, "
            "GPT-2, GPT-NeoX and OPT do; for GPT-2, reorder_and_upcast_attn must be off."
        )


def last_attending(decoder: Decoder) -> nn.Module:
    """The last layer with attention."""
    return [layer for layer in decoder.layers if layer not in decoder.mixers][-1]


def _column_sums(output_BTNH: torch.Tensor, value_BKTH: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """A^T 1 over valid rows, averaged over heads: [B, T].

    Row i puts its 1 into channel i mod H. One channel would do, but in 16 bits it would be rounded once, as a whole; H
    partial sums, added in float32, lose less (a third of the error at T = 2048 and H = 64) and stay in float16's range.
    """
    _, tokens, heads, channels = output_BTNH.shape
    channel_of_row = torch.arange(tokens, device=output_BTNH.device) % channels
    # Not one_hot, which has the host look at the classes.
    one_hot_TH = channel_of_row[:, None] == torch.arange(channels, device=output_BTNH.device)
    one_hot_BT1H = (one_hot_TH * valid_BT[..., None])[:, :, None]
    cotangent_BTNH = one_hot_BT1H.to(output_BTNH.dtype).expand_as(output_BTNH)
    (grad_BKTH,) = torch.autograd.grad(output_BTNH, value_BKTH, cotangent_BTNH, retain_graph=True)
    sums_BT = grad_BKTH.sum(dim=(1, 3), dtype=torch.promote_types(grad_BKTH.dtype, torch.float32)) / heads
    return sums_BT.masked_fill(~valid_BT, 0)
