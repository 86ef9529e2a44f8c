"""Exact layers: one backward pass over all tokens gives all that is needed of head and top layers.

It gives the gradient at the border, the input of the lowest exact layer, by which tokens are selected; and the
gradients of the weights above the border, which wait for the backward pass of the step's loss. So nothing above the
border is gone through twice, and none of its activations are kept while the selected rows run. Where an engine lets
weights go, :mod:`tokenseek.ditching.top` runs these layers once more instead.

Shapes: B batch, T tokens, S selected, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tokenseek.decoder.device import alone
from tokenseek.decoder.head import at_least_float32
from tokenseek.ditching.top import seeds


@dataclass
class ExactTop:
    """Head and top layers that have run over all tokens, forwards and backwards.

    Attributes:
        loss_sum: of the cross-entropies of all supervised tokens; where ranks share a text, of this rank's. Its
            backward pass hands the weights above the border the gradients that are known.
        gradient_BTD: of the sum over all ranks with respect to the border, of all tokens.
    """

    loss_sum: torch.Tensor
    gradient_BTD: torch.Tensor

    def loss(self, selected_BSD: torch.Tensor, positions_BS: torch.Tensor, weights_BS: torch.Tensor) -> torch.Tensor:
        """`loss_sum`, whose gradient reaches the weights below the border too: there it is the estimate.

        Args:
            selected_BSD: the selected rows of this process at the border.
            positions_BS: theirs in the text, negative where a slot is empty.
            weights_BS: one over the probability of each.
        """
        surrogate = (seeds(self.gradient_BTD, positions_BS, weights_BS) * at_least_float32(selected_BSD)).sum()
        return self.loss_sum + (surrogate - surrogate.detach())


def exact_top(
    loss_sum: torch.Tensor, border_BTD: torch.Tensor, gathered: Callable[[torch.Tensor], torch.Tensor] | None
) -> tuple[ExactTop, torch.Tensor]:
    """Go backwards from the loss of this process's rows to the border, through a graph that is freed by it.

    Args:
        loss_sum: with a graph down to the border.
        border_BTD: these rows at the border, the graph's leaf.
        gathered: from this process's rows [B, T, D] to those of all tokens, where ranks share a text.

    Returns:
        The exact layers, and the gradient of this process's rows at the border.
    """
    weights = [leaf for leaf in _leaves(loss_sum) if leaf is not border_BTD]
    with _without_hooks(weights):
        (gradient_BTD, *found) = torch.autograd.grad(loss_sum, [border_BTD, *weights], allow_unused=True)
    reached = [weight for weight, gradient in zip(weights, found, strict=True) if gradient is not None]
    gradients = _each_alone([gradient for gradient in found if gradient is not None])
    with torch.enable_grad():
        loss_sum = _WithKnownGradients.apply(loss_sum.detach(), gradients, *reached)
    of_all_BTD = gradient_BTD if gathered is None else gathered(gradient_BTD)
    return ExactTop(loss_sum, of_all_BTD), gradient_BTD


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that the graph of `loss` begins with, in the order in which they are met."""
    found, waiting, seen = [], [loss.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [below for below, _ in node.next_functions]
    return found


@contextmanager
def _without_hooks(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """In the block, hooks on the tensors do not run: they do once a step, in the backward pass of its loss."""
    hooks = [tensor._backward_hooks for tensor in tensors]
    for tensor in tensors:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, own in zip(tensors, hooks, strict=True):
            tensor._backward_hooks = own


def _each_alone(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same, each in memory of its own, which may be written to."""
    taken: dict[int, torch.Tensor] = {}
    for gradient in map(alone, gradients):
        where = gradient.untyped_storage()._cdata
        gradient = gradient.clone() if where in taken else gradient
        taken[gradient.untyped_storage()._cdata] = gradient
    return list(taken.values())


class _WithKnownGradients(torch.autograd.Function):
    """The loss as it is; its backward pass hands out gradients that are known already, once."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The loss of a step with exact layers goes through one backward pass, also with retain_graph=True: its "
                "gradients are handed out, not computed anew. Call the model once more."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: that of the head is as large as its weight, and from here on belongs to whoever takes it.
        torch._foreach_mul_(gradients, gradient)
        return None, None, *gradients
