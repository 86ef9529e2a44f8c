"""Exact layers where an engine lets weights go (ZeRO-3, FSDP2): the second pass runs them once more, over all tokens.

An engine expects one backward pass of a layer. So the first pass takes no more than the gradient at the border, the
input of the lowest exact layer, to select by. In the second, the selected rows reach the border and all rows go on from
there, as the first pass left them; backwards, the selected rows are handed their gradient over their probability.

Shapes: B batch, T tokens, S selected, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tokenseek.decoder.attention import Replace, attention_replaced, without_cudnn
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.head import at_least_float32
from tokenseek.decoder.names import without_checkpointing


class Top:
    """The exact layers of one step.

    Args:
        targets_BT: what the rows of this process have to predict.
        gathered: from this process's rows [B, T, D] to those of all tokens, where ranks share a text.

    Attributes:
        border_BTD: all rows of this process at the border, from the first pass.
        selected: positions and weights [B, S] of the selected rows of this process; known to the second pass.
        reached: whether the second pass has come to the border.
    """

    def __init__(
        self, decoder: Decoder, targets_BT: torch.Tensor, gathered: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        self.decoder, self.targets_BT, self.gathered = decoder, targets_BT, gathered
        self.border_BTD: torch.Tensor | None = None
        self.selected: tuple[torch.Tensor, torch.Tensor] | None = None
        self.reached = False
        self._calls: dict[nn.Module, tuple[Callable[[torch.Tensor], Any], Replace | None]] = {}

    def put(
        self,
        layer: nn.Module,
        hidden_BTD: torch.Tensor,
        call: Callable[[torch.Tensor], Any],
        replace: Replace | None,
    ) -> None:
        """Note how the first pass called a layer: with `hidden_BTD`, by `call`, its attention replaced by `replace`."""
        if self.border_BTD is None:
            self.border_BTD = hidden_BTD.detach()
        self._calls[layer] = call, replace

    def holds(self, layer: nn.Module) -> bool:
        """Whether the layer is exact, and has not run again yet."""
        return layer in self._calls

    def cross_border(self, selected_BSD: torch.Tensor) -> torch.Tensor:
        """[B, T, D]: all rows at the border, whose gradient becomes that of the selected ones."""
        self.reached = True
        border_BTD: torch.Tensor = _AllRows.apply(selected_BSD, self)
        return border_BTD

    def run(self, layer: nn.Module, hidden_BTD: torch.Tensor, recompute: bool) -> Any:
        """The layer's output for all rows, as the first pass called it."""
        call, replace = self._calls.pop(layer)

        def again(hidden_BTD: torch.Tensor) -> Any:
            attention = without_cudnn() if replace is None else attention_replaced(self.decoder.causal_lm, replace)
            with without_checkpointing(layer), attention:
                return call(hidden_BTD)

        if recompute and torch.is_grad_enabled():
            return checkpoint(again, hidden_BTD, use_reentrant=False)
        return again(hidden_BTD)

    def gradient_of_selected(self, gradient_BTD: torch.Tensor) -> torch.Tensor:
        """[B, S, D]: each selected row's own, times its weight; zero in empty slots."""
        assert self.selected is not None, "the second pass is told what is selected"
        positions_BS, weights_BS = self.selected
        if self.gathered is not None:
            gradient_BTD = self.gathered(gradient_BTD)
        return seeds(gradient_BTD, positions_BS, weights_BS)


def seeds(gradient_BTD: torch.Tensor, positions_BS: torch.Tensor, weights_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, D], at least float32: gradients of the rows at `positions_BS` times their weights; 0 where negative."""
    index_BSD = positions_BS.clamp(min=0)[..., None].expand(*positions_BS.shape, gradient_BTD.shape[-1])
    weights_BS = weights_BS.masked_fill(positions_BS < 0, 0)
    return at_least_float32(gradient_BTD.gather(1, index_BSD)) * weights_BS[..., None]


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, selected_BSD: torch.Tensor, top: Top) -> torch.Tensor:
        ctx.top, ctx.dtype = top, selected_BSD.dtype
        assert top.border_BTD is not None, "the first pass has been at the border"
        border_BTD, top.border_BTD = top.border_BTD, None
        return border_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.top.gradient_of_selected(gradient_BTD).to(ctx.dtype), None
