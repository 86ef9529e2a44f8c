"""Linear layers whose weight is packed in 4 or 8 bits, for planning: the bytes of bitsandbytes without its kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from tokenseek.config import ModelConfig
from tokenseek.ditching.converted import conversions_in_force

# bitsandbytes' block sizes: one scale for 64 weights; under double quantisation one byte, with a scale for 256 of them.
_BLOCK, _DOUBLE_BLOCK = 64, 256


class PackedLinear(nn.Linear):
    """Takes the place of a linear layer; unpacks its weight for the product, and once more in the backward pass.

    Where a layer's weights in 4 bits are unpacked once for its two passes, so is this one.
    Engines split the packed weight; the scales are no parameter, and every process has all of them.
    """

    def __init__(self, like: nn.Linear, model: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.dtype = getattr(torch, model.dtype)
        self.is_4bit = model.quantization != "int8"
        self.weight = nn.Parameter(torch.empty(packed_bytes(like, model), dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(scale_bytes(like, model), dtype=torch.uint8), persistent=False)
        self.bias = like.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        converted, y = conversions_in_force(), x.to(self.dtype)
        if converted is not None and converted.unpacks_once and self.is_4bit:
            shape = self.out_features, self.in_features
            unpack = partial(torch.zeros, shape, dtype=self.dtype, device=y.device)  # written, as unpacking does
            output = converted.product(y, self, unpack)
        else:
            output = _PackedProduct.apply(y, self.weight, self.out_features)
        # PEFT copies what a 4-bit layer returns.
        return (output if self.bias is None else output + self.bias).to(x.dtype).clone()


def pack_linear_layers(model: PreTrainedModel, settings: ModelConfig) -> None:
    """Replace every linear layer but the head, as Transformers does with `quantization`."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, PackedLinear(child, settings))


def packed_bytes(layer: nn.Linear, model: ModelConfig) -> int:
    """Of its weight, without the scales."""
    weights = layer.in_features * layer.out_features
    return weights if model.quantization == "int8" else -(-weights // 2)


def scale_bytes(layer: nn.Linear, model: ModelConfig) -> int:
    if model.quantization == "int8":
        return 4 * layer.out_features
    blocks = -(-layer.in_features * layer.out_features // _BLOCK)
    return blocks + 4 * -(-blocks // _DOUBLE_BLOCK) if model.double_quantization else 4 * blocks


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        return linear(x, x.new_zeros(ctx.shape))  # written, as unpacking does

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ gradient.new_zeros(ctx.shape), None, None
