"""Gradient importance, Eq. 4: how strongly the loss depends on a token's hidden state before the last layer.

Shapes: B batch, T tokens, R supervised rows, C rows of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tokenseek.decoder.device import start_of_graph
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.head import BodyOutput, at_least_float32, head_logits_of_batch, in_one_call, rows_per_chunk
from tokenseek.labels import IGNORED

# Logits are held of this share of a batch's tokens at once, but of so many at least: every chunk reads all weights of
# the head once more, and what it takes should stay below what the last layer's graph does.
SHARE_OF_ROWS, FEWEST_ROWS = 1 / 5, 128

# Eq. 4 sums the entries (signed); the text around it sums magnitudes (abs).
REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
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

    def start_graph(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        torch.set_grad_enabled(True)
        leaf_BTD, entering_BTD = start_of_graph(hidden_BTD)
        leaves.append(leaf_BTD)
        return ((entering_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entering_BTD})

    # Undone by the end of `no_grad`, which restores the mode that it found.
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(start_graph, with_kwargs=True)
        try:
            yield leaves
        finally:
            handle.remove()


@contextmanager
def gradient_beyond(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A forward pass in the block records no graph up to the output of `layer`, which becomes a leaf.

    Yields:
        A list that holds that leaf [B, T, D] once `layer` has run.
    """
    leaves: list[torch.Tensor] = []

    def start_graph(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        torch.set_grad_enabled(True)
        leaf_BTD, entering_BTD = start_of_graph(hidden_BTD)
        leaves.append(leaf_BTD)
        return (entering_BTD, *output[1:]) if isinstance(output, tuple) else entering_BTD

    with torch.no_grad():
        handle = layer.register_forward_hook(start_graph)  # behind those of parallel engines
        try:
            yield leaves
        finally:
            handle.remove()


class HeadScores(NamedTuple):
    """What the head says of the supervised positions.

    Attributes:
        losses: cross-entropy of each position, at least float32 [B, T]; 0 where there is none; None if not asked for.
        errors: the norm of p - y, the gradient of that loss with respect to the logits, [B, T]; None if not asked for.
        gradient: of the sum of the losses with respect to the final hidden states [B, T, D]; None if not asked for.
    """

    losses: torch.Tensor | None
    errors: torch.Tensor | None
    gradient: torch.Tensor | None


def head_scores(
    decoder: Decoder,
    body_output: BodyOutput,
    targets_BT: torch.Tensor,
    supervised_R: torch.Tensor | None = None,
    *,
    losses: bool = False,
    errors: bool = False,
    gradient: bool = False,
) -> HeadScores:
    """Run the head over all supervised positions, a few rows at a time, without a graph.

    Args:
        body_output: what the decoder's body returned.
        targets_BT: the token that each position predicts, -100 where it carries no loss.
        supervised_R: which of the B x T positions carry one; the host waits for the device to learn it otherwise.
    """
    hidden_BTD = body_output.last_hidden_state.detach()
    zeros_BT = at_least_float32(hidden_BTD.new_zeros(targets_BT.shape))
    losses_BT, errors_BT = zeros_BT if losses else None, torch.zeros_like(zeros_BT) if errors else None
    gradient_BTD = torch.zeros_like(hidden_BTD) if gradient else None
    flat_targets = targets_BT.flatten()
    if supervised_R is None:
        supervised_R = flat_targets.ne(IGNORED).nonzero().squeeze(1)
    hidden_RD, targets_R = (x.index_select(0, supervised_R) for x in (hidden_BTD.flatten(0, 1), flat_targets))
    # The head is the widest part of the model, so it is taken a few rows at a time down to its input.
    most = max(FEWEST_ROWS, math.ceil(SHARE_OF_ROWS * targets_BT.numel()))
    # Of even size: a last one of a few rows would read all of the head's weights too.
    chunks = math.ceil(len(targets_R) / min(rows_per_chunk(decoder, hidden_BTD.device), most)) or 1
    found = []

    def run(hidden_RD: torch.Tensor) -> torch.Tensor:
        for chunk in zip(hidden_RD.tensor_split(chunks), targets_R.tensor_split(chunks), strict=True):
            if len(chunk[1]):
                found.append(_head_chunk(decoder, body_output, *chunk, losses, errors, gradient))
        return hidden_RD

    with torch.no_grad():
        in_one_call(decoder.causal_lm.get_output_embeddings(), run, hidden_RD)
    if found:
        of_chunks, norms, gradients = zip(*found, strict=True)
        if losses_BT is not None:
            losses_BT.view(-1).index_copy_(0, supervised_R, torch.cat(of_chunks))
        if errors_BT is not None:
            errors_BT.view(-1).index_copy_(0, supervised_R, torch.cat(norms))
        if gradient_BTD is not None:
            gradient_BTD.view(-1, gradient_BTD.shape[-1]).index_copy_(0, supervised_R, torch.cat(gradients))
    return HeadScores(losses_BT, errors_BT, gradient_BTD)


def loss_gradient(
    body_output: BodyOutput,
    leaf_BTD: torch.Tensor,
    head_gradient_BTD: torch.Tensor,
    supervised_B: torch.Tensor,
) -> torch.Tensor:
    """G [B, T, D] of Eq. 4: the gradient of each example's mean cross-entropy over its supervised positions.

    It has the leaf's precision, but at least float32. The mean is taken per example, so that scores do not depend on
    which examples share a batch. An example without a supervised position has gradient zero.

    Args:
        body_output: what the decoder's body returned, with a graph back to `leaf_BTD`.
        head_gradient_BTD: of the sum of the losses, see :func:`head_scores`.
        supervised_B: how many positions of each example carry one; more than are here, where ranks share a text.
    """
    (gradient_BTD,) = torch.autograd.grad(body_output.last_hidden_state, leaf_BTD, head_gradient_BTD)
    # Sums of losses until here: dividing last, in float32, keeps small numbers from vanishing in 16 bits.
    return at_least_float32(gradient_BTD) / supervised_B.clamp(min=1)[:, None, None]


def _head_chunk(
    decoder: Decoder,
    body_output: BodyOutput,
    hidden_CD: torch.Tensor,
    targets_C: torch.Tensor,
    losses: bool,
    errors: bool,
    gradient: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Where asked for: losses, norms of p - y, and the gradient of the sum of the losses with respect to `hidden_CD`.

    The gradient with respect to the logits is their softmax less the target, p - y. It is written over the logits,
    unless the head's own backward pass needs them.
    """
    hidden_CD = hidden_CD.detach().requires_grad_(gradient)
    needed: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        needed.add(tensor.untyped_storage()._cdata)
        return tensor

    with torch.set_grad_enabled(gradient), saved_tensors_hooks(note, lambda tensor: tensor):
        # Not a view of them: autograd would copy the gradient of a view that was written over, among zeros.
        logits_1CV = head_logits_of_batch(decoder, body_output, hidden_CD)
    buffer_CV = logits_1CV.detach().squeeze(0)
    if buffer_CV.untyped_storage()._cdata in needed:
        buffer_CV = buffer_CV.clone()
    error_CV = at_least_float32(buffer_CV)
    losses_C = None
    if losses:
        below_largest_C = error_CV.amax(-1) - error_CV.gather(-1, targets_C[:, None]).squeeze(-1)
    torch.softmax(error_CV, -1, out=error_CV)
    if losses:  # log p of the target, by way of the largest logit: p itself may vanish
        losses_C = below_largest_C - error_CV.amax(-1).log()
    error_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    norms_C = torch.linalg.vector_norm(error_CV, dim=-1) if errors else None
    if not gradient:
        return losses_C, norms_C, None
    return losses_C, norms_C, torch.autograd.grad(logits_1CV, hidden_CD, buffer_CV.copy_(error_CV)[None])[0]
