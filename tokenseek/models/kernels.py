"""Fewer kernels for the same layer: norms and feed-forward blocks compiled, or replaced by Liger's.

In eager mode a norm is six kernels and a gated feed-forward block two beside its products. Short steps on a GPU wait
for their launches, and long ones for the memory that they read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenseek.decoder.find import find_causal_lm, find_layers
from tokenseek.errors import UserError
from tokenseek.launching import environment

if TYPE_CHECKING:  # the kernels themselves need no library of settings
    from tokenseek.config import RunConfig


def require_kernels(config: RunConfig) -> None:
    """Refuse a run whose kernels are not available, before its model is loaded.

    Raises:
        UserError: ``training.liger`` without the package or without a GPU; ``training.compile`` under ZeRO-3, whose
            hooks gather weights inside what would be compiled, or over packed 4- and 8-bit weights.
    """
    training = config.training
    if training.liger and find_spec("liger_kernel") is None:
        raise UserError(
            "training.liger: the package liger-kernel is not installed. Install it (pip install liger-kernel), or set "
            "training.liger to false."
        )
    if training.liger and not torch.cuda.is_available():
        raise UserError("training.liger: its kernels run on GPUs, and none is here. Set training.liger to false.")
    if training.liger and training.compile:
        raise UserError("training.liger and training.compile are for the same kernels; set one of them to false.")
    if training.compile and environment.zero_stage() == 3:
        raise UserError(
            "training.compile is not supported with ZeRO-3, which gathers weights inside a layer; launch with zero2 or "
            "fsdp2, or set training.compile to false."
        )
    if training.compile and config.model.quantization:
        raise UserError(
            f"training.compile is not supported with model.quantization: {config.model.quantization}, whose products "
            "are no part of a graph; set one of them to false or null."
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Liger's RMSNorm, rotary embedding and SwiGLU in the place of the model's, permanently.

    Its cross-entropies are left out: the loss here is of the selected rows alone.

    Raises:
        UserError: Liger has none for this model.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"training.liger: liger-kernel has nothing for model type {model.config.model_type!r}. Set training.liger "
            "to false; training.compile serves every model."
        )
    own = dict(rope=True, rms_norm=True, swiglu=True, geglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    accepted = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type].__code__.co_varnames
    _apply_liger_kernel_to_instance(model=model, **{name: value for name, value in own.items() if name in accepted})


def compile_regions(model: nn.Module, backend: str | Callable = "inductor") -> int:
    """Compile what lies outside attention in every layer, in place: norms and feed-forward blocks; returns how many.

    These have no graph break: all else that a layer does here (two passes, one inside the other, through a cache of
    ours) is no single graph. Numbers of tokens are symbols in them, so that new lengths compile nothing again.
    """
    compiled = 0
    for module in _regions(model):
        module.compile(dynamic=True, fullgraph=True, backend=backend)
        compiled += 1
    return compiled


def _regions(model: nn.Module) -> Iterator[nn.Module]:
    for layer in find_layers(find_causal_lm(model))[1]:
        for child in layer.children():
            holds_attention = any(type(module).__name__.endswith("Attention") for module in child.modules())
            is_one_kernel = type(child).__module__.startswith("torch.nn.")  # a LayerNorm, a dropout
            if not holds_attention and not is_one_kernel:
                yield child
