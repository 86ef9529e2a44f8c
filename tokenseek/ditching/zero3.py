"""Under ZeRO-3, a decoder layer gathers its parameters once for its two passes.

ZeRO-3 gathers parameters in hooks of every submodule. The passes run submodules twice, one pass in the middle of the
other, and the last layer's unselected pass ends half-way, past the hooks that would let its parameters go. As leaves,
layers are gathered and released whole, and their submodules have no hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from tokenseek.decoder.find import Decoder

# Of the numbers of the largest layer, fetched ahead: it should be there when the layer before it is done.
LAYERS_AHEAD = 1.2


def gather_layers_once(decoder: Decoder) -> None:
    """Make the decoder's layers leaves of ZeRO-3, where it is active; has to come before ``deepspeed.initialize``.

    ``enable_token_ditching`` does so when ZeRO-3 has been configured by then, :class:`TokenSeekTrainer` in any case.
    """
    if not is_deepspeed_zero3_enabled():
        return
    from deepspeed.utils import set_z3_leaf_module

    for layer in decoder.layers:
        set_z3_leaf_module(layer, True)
    head: nn.Module = decoder.causal_lm.get_output_embeddings()
    if any(head.children()):  # of an adapter; gathered for every chunk of rows, of which ranks have different numbers
        set_z3_leaf_module(head, True)
    # DeepSpeed reduces a leaf's gradients when those of its inputs are known. Inputs without gradient, as frozen
    # embeddings give, count as known from the start: the first layer's gradients would be reduced before they exist.
    embeddings: Any = decoder.causal_lm.get_input_embeddings()
    if not hasattr(embeddings, "_gives_gradient"):
        embeddings._gives_gradient = embeddings.register_forward_hook(_require_gradient)


def ungather_layers(decoder: Decoder) -> None:
    """Undo :func:`gather_layers_once`; of no effect on a model that DeepSpeed has initialised already."""
    for module in (*decoder.layers, decoder.causal_lm.get_output_embeddings()):
        module.__dict__.pop("_z3_leaf", None)
    embeddings = decoder.causal_lm.get_input_embeddings()
    if hook := embeddings.__dict__.pop("_gives_gradient", None):
        hook.remove()


def fetch_a_layer_ahead(decoder: Decoder, zero_optimization: dict[str, Any]) -> None:
    """Of ZeRO-3's settings, make a prefetch bucket that is left to "auto" hold more than the largest layer.

    Transformers' own value, 0.9 D^2, is less than a leaf has, so that no layer would be under way whole.
    """
    if zero_optimization.get("stage3_prefetch_bucket_size") == "auto":
        largest = max(sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in decoder.layers)
        zero_optimization["stage3_prefetch_bucket_size"] = int(LAYERS_AHEAD * largest)


def _require_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
