"""Cross-entropy of the selected rows, without ever holding their logits all at once.

Shapes: B batch, T tokens, S selected, R supervised rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from tokenseek.decoder.find import Decoder
from tokenseek.decoder.head import at_least_float32, head_logits, rows_per_chunk
from tokenseek.ditching.zero3 import is_partitioned
from tokenseek.labels import IGNORED


def selected_loss(
    decoder: Decoder,
    body_output,
    hidden_BSD: torch.Tensor,
    labels_BS: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    recompute: bool,
    weights_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the cross-entropies of supervised rows over their number, or over `num_items_in_batch` when given.

    With no supervised row the loss is 0 with a live graph, so that every gradient exists and every collective runs.

    Args:
        recompute: compute the logits once more in the backward pass rather than store them. If they do not fit one
            chunk this is done anyway, and never under a head that is not trained.
        weights_BS: of the rows' losses in the sum; all 1 by default.
    """
    hidden_RD, labels_R = hidden_BSD.flatten(0, 1), labels_BS.flatten()
    supervised = labels_R.ne(IGNORED).nonzero().squeeze(1)
    if len(supervised) == 0:
        supervised = supervised.new_zeros(1)
    hidden_RD, labels_R = hidden_RD[supervised], labels_R[supervised]
    if weights_BS is None:
        weights_R = torch.ones(len(labels_R), device=labels_R.device)
    else:
        weights_R = weights_BS.flatten()[supervised]

    rows = rows_per_chunk(decoder)
    chunks = list(zip(hidden_RD.split(rows), labels_R.split(rows), weights_R.split(rows), strict=True))
    head = decoder.causal_lm.get_output_embeddings()
    without_loss = hidden_RD[:1], torch.full_like(labels_R[:1], IGNORED), weights_R[:1]
    chunks += [without_loss] * (most_chunks(head, len(chunks)) - len(chunks))
    is_constant = torch.is_grad_enabled() and hidden_RD.requires_grad and _is_constant(head)
    is_stored = not (is_constant or recompute or len(chunks) > 1)

    def chunk_loss(hidden_CD, labels_C, weights_C):
        losses_C = _CrossEntropy.apply(head_logits(decoder, body_output, hidden_CD), labels_C, not is_stored)
        return (losses_C * weights_C.to(losses_C)).sum()  # not `@`, which autocast would compute in 16 bits

    if is_stored:
        total = chunk_loss(*chunks[0])
    elif is_constant:
        total = sum(_LossWithGradient.apply(chunk_loss, *chunk) for chunk in chunks)
    else:
        total = sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)
    if num_items_in_batch is None:
        num_items_in_batch = weights_R[labels_R.ne(IGNORED)].sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


def most_chunks(head: nn.Module, own: int) -> int:
    """How many chunks this process runs. Under ZeRO-3 every chunk gathers the head's weights, and a gather needs all
    processes: those with fewer chunks join in.
    """
    if not is_partitioned(head):
        return own
    most = torch.tensor(own, device=next(head.parameters()).device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


class _CrossEntropy(torch.autograd.Function):
    """Of each row, [C] in at least float32, 0 where IGNORED.

    As torch's, in fewer matrices of [C, V]: the log-probabilities are written over the float32 copy of 16-bit logits,
    and their gradient over them if one backward pass is all that they are made for (`once`).
    """

    @staticmethod
    def forward(ctx, logits_CV: torch.Tensor, labels_C: torch.Tensor, once: bool) -> torch.Tensor:
        floats_CV = at_least_float32(logits_CV)
        is_copy = floats_CV is not logits_CV  # else the head may need its logits again
        log_probs_CV = torch.log_softmax(floats_CV, -1, out=floats_CV) if is_copy else floats_CV.log_softmax(-1)
        ctx.dtype, ctx.once, ctx.is_ignored_C = logits_CV.dtype, once, labels_C.eq(IGNORED)
        ctx.labels_C1 = labels_C.masked_fill(ctx.is_ignored_C, 0)[:, None]
        ctx.save_for_backward(log_probs_CV)
        return -log_probs_CV.gather(-1, ctx.labels_C1).squeeze(-1).masked_fill(ctx.is_ignored_C, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_C: torch.Tensor):
        (log_probs_CV,) = ctx.saved_tensors
        gradient_C1 = gradient_C.masked_fill(ctx.is_ignored_C, 0)[:, None]
        gradient_CV = log_probs_CV.exp_() if ctx.once else log_probs_CV.exp()
        gradient_CV.mul_(gradient_C1).scatter_add_(-1, ctx.labels_C1, -gradient_C1)
        return gradient_CV.to(ctx.dtype), None, None


class _LossWithGradient(torch.autograd.Function):
    """A chunk's loss and, at once, its gradient with respect to the hidden states: no logits are kept or recomputed."""

    @staticmethod
    def forward(ctx, chunk_loss, hidden_CD, labels_C, weights_C) -> torch.Tensor:
        with torch.enable_grad():
            hidden_CD = hidden_CD.detach().requires_grad_()
            loss = chunk_loss(hidden_CD, labels_C, weights_C)
            loss.backward()  # reaches nothing but the hidden states
        ctx.save_for_backward(hidden_CD.grad)
        return loss.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (gradient_CD,) = ctx.saved_tensors
        return None, gradient_CD * gradient, None, None


def _is_constant(head: nn.Module) -> bool:
    """Whether it has no gradient of its own, and no engine whose hooks would take ours for the backward pass."""
    is_trained = any(parameter.requires_grad for parameter in head.parameters())
    return not (is_trained or is_partitioned(head) or isinstance(head, FSDPModule))
