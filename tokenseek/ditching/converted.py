"""A layer's weights converted once for its two passes: unpacked from 4 bits, or cast under autocast.

Both are done for every product, of which a layer has two with each weight, one for each kind of rows. Here the
converted weight is kept for as long as the layer runs, one layer's at a time. For the backward pass 4-bit weights are
unpacked anew, as bitsandbytes does.

Who recomputes asks for memory: then 4-bit weights are unpacked for every product. Casts are shared all the same, since
autocast itself would keep those of all layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear


class Conversions:
    """The converted weights of the layer that runs.

    Args:
        with_gradient: of its selected pass.
        recomputed: its selected pass runs once more in the backward pass.

    Attributes:
        unpacks_once: weights in 4 bits are among them.
    """

    def __init__(self, with_gradient: bool, recomputed: bool) -> None:
        self.with_gradient, self.unpacks_once = with_gradient, not recomputed
        self._made: dict[tuple[int, torch.dtype], tuple[Any, torch.Tensor]] = {}

    def once(self, source: Any, dtype: torch.dtype, convert: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``convert()``, called the first time that `source` is asked for in `dtype`, whichever pass asks.

        It runs as in the selected pass, so that its gradient is not lost if the unselected pass asks first.
        """
        key = id(source), dtype
        if key not in self._made:
            with torch.set_grad_enabled(self.with_gradient):
                self._made[key] = source, convert()  # with what it is made of, whose id it goes by
        return self._made[key][1]

    def product(
        self, x: torch.Tensor, packed: Any, unpack: Callable[[], torch.Tensor], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x` times a frozen weight that ``unpack()`` makes of what it is `packed` in, and the bias.

        Autograd keeps `unpack`, which therefore holds nothing else.
        """
        weight = self.once(packed, x.dtype, unpack)
        with _without_autocast(x.device.type):
            if not (torch.is_grad_enabled() and x.requires_grad):
                return linear(x, weight, bias)
            trained = bias if bias is not None and bias.requires_grad else None
            output: torch.Tensor = _UnpackedAgain.apply(x, weight, unpack, bias if trained is None else None)
            return output if trained is None else output + trained


_in_force: ContextVar[Conversions | None] = ContextVar("_in_force", default=None)


def conversions_in_force() -> Conversions | None:
    """Those of the layer that runs; None where it runs as it is."""
    return _in_force.get()


@contextmanager
def converted_once(layer: nn.Module, with_gradient: bool, recomputed: bool) -> Iterator[None]:
    """In the block, in which `layer` runs, its linear layers share converted weights; a block within is of no effect.

    Args:
        with_gradient, recomputed: see :class:`Conversions`.
    """
    if _in_force.get() is not None:
        yield
        return
    conversions = Conversions(with_gradient, recomputed)
    token = _in_force.set(conversions)
    try:
        with ExitStack() as replaced:
            if conversions.unpacks_once:
                replaced.enter_context(_bitsandbytes_replaced(conversions))
            if torch.is_autocast_enabled(next(layer.parameters()).device.type):
                replaced.callback(_replace_linear_layers(layer, conversions))
            yield
    finally:
        _in_force.reset(token)


class _UnpackedAgain(torch.autograd.Function):
    """A product of which nothing is kept but what the weight is packed in."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, unpack: Callable[[], torch.Tensor], bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.unpack = unpack
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient @ ctx.unpack().to(gradient.dtype), None, None, None


@contextmanager
def _bitsandbytes_replaced(conversions: Conversions) -> Iterator[None]:
    """In the block, its layers in 4 bits multiply by what is unpacked once."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # so that no model has such layers
        yield
        return
    matmul_4bit = bitsandbytes.matmul_4bit

    def product(x: torch.Tensor, packed: torch.Tensor, quant_state: Any, out: Any = None, bias: Any = None) -> Any:
        wide = x.shape[-1] == quant_state.shape[-1]  # what is packed is [outputs, inputs]
        if out is not None or not wide or getattr(quant_state, "packing_format_for_cpu", False):
            return matmul_4bit(x, packed, quant_state=quant_state, out=out, bias=bias)

        dtype = x.dtype

        def unpack() -> torch.Tensor:
            weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(packed.view(-1, 1), quant_state)
            return weight.to(dtype)

        return conversions.product(x, quant_state, unpack, bias)

    bitsandbytes.matmul_4bit = product
    try:
        yield
    finally:
        bitsandbytes.matmul_4bit = matmul_4bit


def _replace_linear_layers(layer: nn.Module, conversions: Conversions) -> Callable[[], None]:
    """Have the layer's linear layers multiply by weights that are cast once, as autocast does; returns the undoing.

    Compiled regions are left alone: their graphs cast.
    """
    compiled = {inner for module in layer.modules() if module._compiled_call_impl for inner in module.modules()}
    replaced = [
        module
        for module in layer.modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if "forward" not in module.__dict__ and module not in compiled
    ]
    for module in replaced:
        module.__dict__["forward"] = partial(_cast_product, module, conversions)

    def undo() -> None:
        for module in replaced:
            del module.__dict__["forward"]

    return undo


def _cast_product(module: nn.Linear, conversions: Conversions, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.get_autocast_dtype(x.device.type)
    if not torch.is_autocast_enabled(x.device.type) or not _is_cast(module.weight, dtype):
        return linear(x, module.weight, module.bias)
    given = [
        None if weight is None else conversions.once(weight, dtype, partial(weight.to, dtype))
        for weight in (module.weight, module.bias)
    ]
    return linear(x, *given)


def _is_cast(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    is_whole = not isinstance(weight, DTensor)
    return is_whole and weight.is_floating_point() and weight.dtype not in (dtype, torch.float64)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A product in 4 bits is in the precision of its layer's settings."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
