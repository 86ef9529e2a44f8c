"""Cross-entropy of the selected rows, without ever holding their logits all at once.

Shapes: B batch, T tokens, S selected, R supervised rows, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from tokenseek.decoder.find import Decoder, forward_replaced
from tokenseek.decoder.head import (
    BodyOutput,
    at_least_float32,
    head_logits,
    in_one_call,
    is_partitioned,
    rows_per_chunk,
    unwatched,
)
from tokenseek.ditching.planned import supervised_rows
from tokenseek.labels import IGNORED

# Hidden states [C, D], targets [C] and weights [C] of some rows.
Chunk: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
ChunkLoss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def selected_loss(
    decoder: Decoder,
    body_output: BodyOutput,
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
    labels = labels_BS.flatten()
    supervised_R = supervised_rows(labels)  # the host waits for their number
    targets_R = labels.index_select(0, supervised_R)
    return supervised_loss(
        decoder, body_output, hidden_BSD, supervised_R, targets_R, num_items_in_batch, recompute, weights_BS
    )


def supervised_loss(
    decoder: Decoder,
    body_output: BodyOutput,
    hidden_BSD: torch.Tensor,
    supervised_R: torch.Tensor,
    targets_R: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    recompute: bool,
    weights_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`selected_loss` of rows that are known to carry a loss.

    Args:
        supervised_R, targets_R: as in :class:`tokenseek.ditching.planned.PlannedRows`.
    """
    hidden_RD = hidden_BSD.flatten(0, 1).index_select(0, supervised_R)
    weights_R = None if weights_BS is None else weights_BS.flatten().index_select(0, supervised_R)
    chunks = _Chunks(decoder, body_output, targets_R, weights_R, rows_per_chunk(decoder, hidden_RD.device))
    head = decoder.causal_lm.get_output_embeddings()
    has_gradient = torch.is_grad_enabled() and hidden_RD.requires_grad
    called_once = is_partitioned(head) and "forward" not in head.__dict__
    called_once = called_once and (_is_constant(head) or is_plain_trained(head))
    sum_losses = partial(_sum_of_losses, chunks, head, has_gradient, recompute)
    total = in_one_call(head, sum_losses, hidden_RD) if called_once else sum_losses(hidden_RD)
    if num_items_in_batch is None:
        carries_loss_R = targets_R.ne(IGNORED)
        num_items_in_batch = (carries_loss_R if weights_R is None else weights_R[carries_loss_R]).sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


class _Chunks:
    """The supervised rows in chunks of at most `rows`, whose logits are small enough to be held."""

    def __init__(
        self,
        decoder: Decoder,
        body_output: BodyOutput,
        targets_R: torch.Tensor,
        weights_R: torch.Tensor | None,
        rows: int,
    ) -> None:
        self.decoder, self.body_output = decoder, body_output
        self.targets_R, self.weights_R = targets_R, weights_R
        self.borders = (*range(0, len(targets_R), rows), len(targets_R))

    def of(self, hidden_RD: torch.Tensor, borders: tuple[int, ...] | None = None) -> list[Chunk]:
        """Hidden states [C, D], targets [C] and weights [C] of each.

        Args:
            borders: other row numbers than those of :attr:`borders`.
        """
        borders, weights_R = borders or self.borders, self.weights_R
        lengths = [last - first for first, last in pairwise(borders)]
        weights = [None] * len(lengths) if weights_R is None else weights_R.split(lengths)
        return list(zip(hidden_RD.split(lengths), self.targets_R.split(lengths), weights, strict=True))

    def loss(
        self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor | None, once: bool = True
    ) -> torch.Tensor:
        """The sum of the losses of one chunk.

        Args:
            once: the logits go through one backward pass at most.
        """
        logits_CV = head_logits(self.decoder, self.body_output, hidden_CD)
        losses_C: torch.Tensor = _CrossEntropy.apply(logits_CV, targets_C, once)
        # Not `@`, which autocast would compute in 16 bits.
        return losses_C.sum() if weights_C is None else (losses_C * weights_C.to(losses_C)).sum()


def _sum_of_losses(
    chunks: _Chunks, head: nn.Module, has_gradient: bool, recompute: bool, hidden_RD: torch.Tensor
) -> torch.Tensor:
    """Of all rows: with their gradient at once, or with the logits of a single chunk kept, or recomputed."""
    if has_gradient and _is_constant(head):
        run_chunk = _run_chunk.get()
        of_chunks = chunks.of(hidden_RD, run_chunk.borders(*chunks.borders))
        return _sum(run_chunk(_LossWithGradient.apply, chunks.loss, *chunk) for chunk in of_chunks)
    if not recompute and len(chunks.borders) == 2:
        return chunks.loss(*chunks.of(hidden_RD)[0], once=False)
    if has_gradient and is_plain_trained(head):
        loss: torch.Tensor = _LossWithHeadGradient.apply(chunks, head, hidden_RD, head.weight)
        return loss
    return in_one_call(head, partial(_recomputed_losses, chunks, head), hidden_RD)


def _recomputed_losses(chunks: _Chunks, head: nn.Module, hidden_RD: torch.Tensor) -> torch.Tensor:
    def run(*chunk: Any) -> torch.Tensor:
        with unwatched(head):  # in the backward pass too
            return chunks.loss(*chunk)

    return _sum(checkpoint(run, *chunk, use_reentrant=False) for chunk in chunks.of(hidden_RD))


def _sum(losses: Iterable[torch.Tensor]) -> torch.Tensor:
    return cast(torch.Tensor, sum(losses))


class _CrossEntropy(torch.autograd.Function):
    """Of each row, [C] in at least float32, 0 where IGNORED.

    As torch's, in fewer matrices of [C, V]: the log-probabilities are written over the float32 copy of 16-bit logits,
    and their gradient over them if one backward pass is all that they are made for (`once`).
    """

    @staticmethod
    def forward(ctx: Any, logits_CV: torch.Tensor, labels_C: torch.Tensor, once: bool) -> torch.Tensor:
        floats_CV = at_least_float32(logits_CV)
        is_copy = floats_CV is not logits_CV  # else the head may need its logits again
        log_probs_CV = torch.log_softmax(floats_CV, -1, out=floats_CV) if is_copy else floats_CV.log_softmax(-1)
        ctx.dtype, ctx.once, ctx.is_ignored_C = logits_CV.dtype, once, labels_C.eq(IGNORED)
        ctx.labels_C1 = labels_C.masked_fill(ctx.is_ignored_C, 0)[:, None]
        ctx.save_for_backward(log_probs_CV)
        return -log_probs_CV.gather(-1, ctx.labels_C1).squeeze(-1).masked_fill(ctx.is_ignored_C, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_C: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (log_probs_CV,) = ctx.saved_tensors
        gradient_C1 = gradient_C.masked_fill(ctx.is_ignored_C, 0)[:, None]
        gradient_CV = log_probs_CV.exp_() if ctx.once else log_probs_CV.exp()
        gradient_CV.mul_(gradient_C1).scatter_add_(-1, ctx.labels_C1, -gradient_C1)
        return gradient_CV.to(ctx.dtype), None, None


class EveryChunk:
    """How the chunks of a head without gradient are run: all of them, as they are."""

    def borders(self, *borders: int) -> tuple[int, ...]:
        """Of the chunks, row numbers; from 0 to the number of rows."""
        return borders

    def __call__(self, run: Callable[..., torch.Tensor], *chunk: Any) -> torch.Tensor:
        """``run(*chunk)``, or what stands for it."""
        return run(*chunk)


_EVERY_CHUNK = EveryChunk()
_run_chunk: ContextVar[EveryChunk] = ContextVar("_run_chunk", default=_EVERY_CHUNK)


@contextmanager
def chunks_run_by(run_chunk: EveryChunk) -> Iterator[None]:
    """Inside the block, chunks are run by `run_chunk`; a plan skips some."""
    token = _run_chunk.set(run_chunk)
    try:
        yield
    finally:
        _run_chunk.reset(token)


class _LossWithGradient(torch.autograd.Function):
    """A chunk's loss and, at once, its gradient with respect to the hidden states: no logits are kept or recomputed."""

    @staticmethod
    def forward(
        ctx: Any, chunk_loss: ChunkLoss, hidden_CD: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None
    ) -> torch.Tensor:
        with torch.enable_grad():
            hidden_CD = hidden_CD.detach().requires_grad_()
            loss = chunk_loss(hidden_CD, labels_C, weights_C)
            loss.backward()  # reaches nothing but the hidden states
        ctx.save_for_backward(hidden_CD.grad)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_CD,) = ctx.saved_tensors
        return None, gradient_CD * gradient, None, None


class _LossWithHeadGradient(torch.autograd.Function):
    """The loss of all rows and, at once, the gradients of the hidden states and of the head's weight.

    Every chunk adds its part to one gradient of the weight, where autograd would make a matrix of the vocabulary's size
    for each. The weight is converted once, if autocast converts it.
    """

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks, head: nn.Linear, hidden_RD: torch.Tensor, weight_VD: torch.Tensor
    ) -> torch.Tensor:
        ctx.run = partial(_loss_and_gradients, chunks, head)
        total, gradient_RD, gradient_VD = _loss_and_gradients(chunks, head, hidden_RD)
        ctx.gradient_VD = gradient_VD
        ctx.save_for_backward(hidden_RD, gradient_RD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_RD, gradient_RD = ctx.saved_tensors
        gradient_VD, ctx.gradient_VD = ctx.gradient_VD, None
        if gradient_VD is None:  # the graph is gone through once more
            gradient_VD = ctx.run(hidden_RD)[2]
        # In place: it is as large as the weight, and from here on belongs to whoever takes it.
        return None, None, gradient_RD * gradient, gradient_VD.mul_(gradient)


def _loss_and_gradients(
    chunks: _Chunks, head: nn.Linear, hidden_RD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the chunks' losses, and its gradients: [R, D] of the hidden states, [V, D] of the head's weight."""
    weight_VD = head.weight.detach()
    gradient_VD = torch.zeros_like(weight_VD)
    if torch.is_autocast_enabled(hidden_RD.device.type):
        weight_VD = weight_VD.to(torch.get_autocast_dtype(hidden_RD.device.type))
    losses: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    product = partial(_HeadProduct.apply, weight_VD, gradient_VD)
    with torch.enable_grad(), forward_replaced(head, product):
        for hidden_CD, targets_C, weights_C in chunks.of(hidden_RD):
            hidden_CD = hidden_CD.detach().requires_grad_()
            loss = chunks.loss(hidden_CD, targets_C, weights_C)
            gradients += torch.autograd.grad(loss, hidden_CD)
            losses.append(loss.detach())
    return _sum(losses), torch.cat(gradients), gradient_VD


class _HeadProduct(torch.autograd.Function):
    """Logits; the backward pass adds the weight's gradient to `gradient_VD`."""

    @staticmethod
    def forward(ctx: Any, weight_VD: torch.Tensor, gradient_VD: torch.Tensor, hidden_1CD: torch.Tensor) -> torch.Tensor:
        hidden_1CD = hidden_1CD.to(weight_VD.dtype)
        ctx.save_for_backward(hidden_1CD)
        ctx.weights = weight_VD, gradient_VD
        return hidden_1CD @ weight_VD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1CV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden_1CD,), (weight_VD, gradient_VD) = ctx.saved_tensors, ctx.weights
        gradient_CV, hidden_CD = gradient_1CV.flatten(0, -2), hidden_1CD.flatten(0, -2)
        if gradient_VD.dtype == hidden_CD.dtype:
            gradient_VD.addmm_(gradient_CV.T, hidden_CD)
        else:
            gradient_VD.add_(gradient_CV.T @ hidden_CD)
        return None, None, gradient_1CV @ weight_VD


def is_plain_trained(head: nn.Module) -> bool:
    """Whether it is a linear layer of a trained weight alone, which is whole in a call of it (not cut up by FSDP2)."""
    if type(head).forward is not nn.Linear.forward or head.bias is not None:
        return False
    if isinstance(head, FSDPModule) or type(head.weight) is not nn.Parameter or not head.weight.requires_grad:
        return False
    # ZeRO-3's own hooks are all that such a head has.
    is_watched = head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__
    return is_partitioned(head) or not is_watched


def _is_constant(head: nn.Module) -> bool:
    """Whether it has no gradient of its own, and no FSDP2, whose hooks would take ours for the backward pass."""
    is_trained = any(parameter.requires_grad for parameter in head.parameters())
    return not (is_trained or isinstance(head, FSDPModule))
