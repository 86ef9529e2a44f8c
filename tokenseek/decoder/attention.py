"""Taking the place of a model's attention function, for the length of a block.

Transformers' attention layers look their attention function up by name at every call (``AttentionInterface``), so one
place serves every model that does, whatever its architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenseek.decoder.find import Decoder
from tokenseek.decoder.names import ATTENTION_TABLE, EAGER_ATTENTION
from tokenseek.errors import UserError
from tokenseek.versions import what_to_install

# ``(module, query_BNTH, key_BNTH, value_BNTH, attention_mask, **kwargs) -> (output_BTNH, weights_BNTT | None)``
Attention: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
# From the attention function of the model's backend to the one that runs instead.
Replace: TypeAlias = Callable[[Attention], Attention]

# Backends that take a mask of any shape, which selected tokens need: a flash kernel only knows "causal".
MASKED_BACKENDS = ("sdpa", "eager")


def require_masked_backend(model: PreTrainedModel) -> None:
    """Raise UserError unless the model's attention runs on a backend that takes an arbitrary mask."""
    backend = model.config.get_text_config()._attn_implementation
    if backend not in MASKED_BACKENDS:
        raise UserError(
            f"attn_implementation={backend!r} cannot attend from selected tokens alone. Load the model with "
            "attn_implementation='sdpa' (its memory-efficient kernels are used), or 'eager'."
        )


def has_attention_interface(decoder: Decoder) -> bool:
    """Whether the decoder's attention is looked up at every call, so that it can be replaced."""
    modules = {type(module).__module__ for layer in decoder.layers for module in layer.modules()}
    looks_up = any(hasattr(sys.modules[name], ATTENTION_TABLE) for name in modules)
    return looks_up and not getattr(decoder.causal_lm.config, "reorder_and_upcast_attn", False)


def attention_is_ours(decoder: Decoder) -> bool:
    """Whether the model looks its attention function up, and finds one of ours in its place: its backend is sdpa."""
    is_sdpa = decoder.causal_lm.config.get_text_config()._attn_implementation == "sdpa"
    return is_sdpa and has_attention_interface(decoder)


def attends_otherwise(layer: nn.Module, decoder: Decoder) -> UserError:
    """For a layer of a decoder whose attention is ours, which did not call the function that is in its place."""
    return UserError(
        f"{type(layer).__name__} in {decoder.name} does not attend by Transformers' AttentionInterface, although its "
        "module suggests it does: load the model with attn_implementation='eager'."
    )


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside the block, ``scaled_dot_product_attention`` on CUDA chooses among its own kernels and leaves cuDNN's out.

    Those are torch's first choice on Hopper. They make a plan for every new shape, which takes 40 ms and more, and the
    numbers of selected and unselected rows are new in every step; and under a mask the gradient of the queries can be
    NaN (https://github.com/pytorch/pytorch/issues/196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class _Replacement:
    """An entry of the interface that runs ``replace(own)``; `own` is the backend's function, None for eager."""

    def __init__(self, replace: Replace, own: Attention | None) -> None:
        self.replace, self.own = replace, own

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Eager attention is no entry of the interface but a function of each modelling file.
        original = self.own or getattr(sys.modules[type(module).__module__], EAGER_ATTENTION, None)
        if original is None:
            raise UserError(
                f"{type(module).__module__} has no {EAGER_ATTENTION}, its eager attention: load the "
                f"model with attn_implementation='sdpa'. {what_to_install('transformers')}"
            )
        return self.replace(original)(module, *args, **kwargs)


def replacement_in_force(model: PreTrainedModel) -> Replace | None:
    """What :func:`attention_replaced` has been given, inside of its block."""
    now = ALL_ATTENTION_FUNCTIONS.get(model.config.get_text_config()._attn_implementation)
    return now.replace if isinstance(now, _Replacement) else None


@contextmanager
def attention_replaced(model: PreTrainedModel, replace: Replace) -> Iterator[None]:
    """Inside the block, attention runs ``replace(original)`` instead of the `original` function of the model's backend.

    Both have the signature of Transformers' attention functions (:data:`Attention`).
    Blocks do not add up: in a block within a block, the inner replacement alone is in force. cuDNN's kernels are left
    out (:func:`without_cudnn`).
    """
    backend = model.config.get_text_config()._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS.get(backend)
    own = before.own if isinstance(before, _Replacement) else before
    ALL_ATTENTION_FUNCTIONS[backend] = _Replacement(replace, own)
    try:
        with without_cudnn():
            yield
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS[backend]
        else:
            ALL_ATTENTION_FUNCTIONS[backend] = before
