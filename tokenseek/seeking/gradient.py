"""Gradient importance, Eq. 4: how strongly the loss depends on a token's hidden state before the last layer.

Shapes: B batch, T tokens, R supervised rows, C rows of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tokenseek.decoder.find import Decoder
from tokenseek.decoder.head import at_least_float32, head_logits, rows_per_chunk
from tokenseek.labels import IGNORED

# Logits are held of this share of a batch's tokens at once, but of so many at least: every chunk reads all weights of
# the head anew, and what it takes should stay below what the last layer's graph does.
SHARE_OF_ROWS, FEWEST_ROWS = 1 / 5, 128

# Eq. 4 sums the entries (signed); the text around it sums magnitudes (abs).
REDUCTIONS = {
    "abs": lambda gradient_BTD: gradient_BTD.abs().sum(-1),
    "signed": lambda gradient_BTD: gradient_BTD.sum(-1),
    "l2": lambda gradient_BTD: torch.linalg.vector_norm(gradient_BTD, dim=-1),
}


@contextmanager
def gradient_from(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A forward pass in the block records no graph before `layer`, whose input becomes a leaf.

    Yields:
        A list that holds that leaf [B, T, D] once `layer` was reached.
    """
    leaves: list[torch.Tensor] = []

    def start_graph(_, args, kwargs):
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        leaves.append(hidden_BTD.detach().requires_grad_())
        torch.set_grad_enabled(True)
        return ((leaves[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": leaves[0]})

    # Undone by the end of `no_grad`, which restores the mode that it found.
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(start_graph, with_kwargs=True)
        try:
            yield leaves
        finally:
            handle.remove()


def loss_gradient(
    decoder: Decoder, body_output, leaf_BTD: torch.Tensor, targets_BT: torch.Tensor, supervised_B: torch.Tensor
) -> torch.Tensor:
    """G [B, T, D] of Eq. 4: the gradient of each example's mean cross-entropy over its supervised positions.

    It has the leaf's precision, but at least float32. The mean is taken per example, so that scores do not depend on
    which examples share a batch. An example without a supervised position has gradient zero.

    Args:
        body_output: what the decoder's body returned, with a graph back to `leaf_BTD`.
        targets_BT: the token that each position predicts, -100 where it carries no loss.
        supervised_B: how many positions of each example carry one; more than are here, where ranks share a text.
    """
    if not supervised_B.any():
        return at_least_float32(torch.zeros_like(leaf_BTD))
    supervised_BT = targets_BT.ne(IGNORED)

    # The head is the widest part of the model, so it is taken a few rows at a time down to its input; the layers once.
    hidden_BTD = body_output.last_hidden_state
    rows = min(rows_per_chunk(decoder), max(FEWEST_ROWS, int(SHARE_OF_ROWS * targets_BT.numel())))
    chunks = zip(
        hidden_BTD.detach()[supervised_BT].split(rows),
        targets_BT[supervised_BT].split(rows),
        strict=True,
    )
    head_gradient_BTD = torch.zeros_like(hidden_BTD)
    if supervised_BT.any():
        head_gradient_BTD[supervised_BT] = torch.cat([_head_gradient(decoder, body_output, *chunk) for chunk in chunks])
    (gradient_BTD,) = torch.autograd.grad(hidden_BTD, leaf_BTD, head_gradient_BTD)

    # Sums of losses until here: dividing last, in float32, keeps small numbers from vanishing in 16 bits.
    return at_least_float32(gradient_BTD) / supervised_B.clamp(min=1)[:, None, None]


def _head_gradient(decoder: Decoder, body_output, hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    """Of the sum of the cross-entropies, whose gradient with respect to the logits is their softmax less the target.

    It is written over the logits, unless the head's own backward pass needs them.
    """
    hidden_CD.requires_grad_()
    needed = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        needed.add(tensor.untyped_storage()._cdata)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        logits_CV = head_logits(decoder, body_output, hidden_CD)
    buffer_CV = logits_CV.detach()
    if buffer_CV.untyped_storage()._cdata in needed:
        buffer_CV = buffer_CV.clone()
    gradient_CV = at_least_float32(buffer_CV)
    torch.softmax(gradient_CV, -1, out=gradient_CV)
    gradient_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    return torch.autograd.grad(logits_CV, hidden_CD, buffer_CV.copy_(gradient_CV))[0]
