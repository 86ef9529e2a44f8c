"""Where the pieces of a Hugging Face decoder are, found without naming any architecture.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenseek.decoder.names import CACHE_ARGUMENTS, cache_argument
from tokenseek.errors import UserError
from tokenseek.versions import what_to_install


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal language model that TokenSeek works on.

    Attributes:
        causal_lm: the model with the language-modelling head (below any PEFT wrapper).
        body: embeddings, layers and final norm; maps token ids to hidden states [B, T, D].
        layers: the decoder layers, in order.
        cache_argument: the name of the key/value cache among the arguments of a layer's ``forward``.
    """

    causal_lm: PreTrainedModel
    body: nn.Module
    layers: nn.ModuleList
    cache_argument: str

    @property
    def name(self) -> str:
        return type(self.causal_lm).__name__

    @property
    def device(self) -> torch.device:
        """Where token ids are taken: the device of the embeddings."""
        embeddings: Any = self.causal_lm.get_input_embeddings()
        return embeddings.weight.device


def find_decoder(model: nn.Module) -> Decoder:
    """The :class:`Decoder` inside `model`: a Transformers causal LM, plain or wrapped by PEFT or a parallel engine.

    Raises:
        UserError: for anything that is not a causal decoder whose every layer keeps keys and values.
    """
    if prompt_learning := [c.peft_type for c in getattr(model, "peft_config", {}).values() if c.is_prompt_learning]:
        raise UserError(
            f"{prompt_learning[0]} prepends virtual tokens to every example, so token positions no longer match the "
            "index. Use a PEFT method that keeps the sequence as it is: LoRA, LoHa, LoKr, IA3, OFT, ..."
        )
    causal_lm = _unwrap(model)
    name = type(causal_lm).__name__
    if not isinstance(causal_lm, PreTrainedModel):
        raise UserError(f"{name} is not a Transformers model. Load one with AutoModelForCausalLM.from_pretrained(...).")
    _require_causal_lm(causal_lm)
    body = causal_lm.get_decoder()
    # Transformers' last resort, where base_model_prefix names no attribute (Llama-4's text model).
    if body is causal_lm:
        body = getattr(causal_lm, "model", causal_lm)
    layers = _find_layers(body, causal_lm.config.get_text_config().num_hidden_layers)
    if layers is None:
        raise UserError(
            f"{name}: no list of decoder layers found inside {type(body).__name__}; this model is not supported."
        )
    return Decoder(causal_lm, body, layers, _cache_argument(name, layers))


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if base_model := getattr(model, "get_base_model", None):  # PEFT
            model = base_model()
        elif isinstance(inner := getattr(model, "module", None), nn.Module):  # DistributedDataParallel, DeepSpeedEngine
            model = inner
        else:
            return model


def _require_causal_lm(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config
    accepted = (
        "Accepted: decoder-only models loaded with AutoModelForCausalLM (Llama, Qwen, Mistral, Gemma, GPT-2, ...)."
    )
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model. {accepted}")
    if model.get_output_embeddings() is None or not model.can_generate():
        raise UserError(f"{name} has no causal language-modelling head. {accepted}")
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise UserError(f"{name} is not a text-only causal language model. {accepted}")
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        raise UserError(f"{name} has attention that looks ahead, so it is not a causal decoder. {accepted}")
    without_cache = {"linear_attention", "mamba", "recurrent", "conv", "ssm"} & set(
        getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    )
    if without_cache or getattr(model, "_is_stateful", False):
        raise UserError(
            f"{name} has layers without a key/value cache (state-space, recurrent or linear attention), through which "
            f"gradients cannot be cut token by token. {accepted}"
        )
    if sharing := [module for module in model.modules() if getattr(module, "is_kv_shared_layer", False)]:
        raise UserError(
            f"{name} has {len(sharing)} layers that share the keys and values of layers below (Gemma 3n and 4); these "
            "do not pass through the cache, where gradients are cut. Token scoring and ditching do not support them. "
            f"{accepted}"
        )


def _find_layers(body: nn.Module, count: int) -> nn.ModuleList | None:
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return next((m for m in lists if any(cache_argument(layer) for layer in m)), lists[0] if lists else None)


def _cache_argument(name: str, layers: nn.ModuleList) -> str:
    names = {cache_argument(layer) for layer in layers}
    found = names.pop() if len(names) == 1 else None
    if found is None:
        without = next((layer for layer in layers if cache_argument(layer) is None), layers[0])
        raise UserError(
            f"{name}: {type(without).__name__}.forward takes no key/value cache (looked for "
            f"{', '.join(CACHE_ARGUMENTS)}); TokenSeek reaches keys and values through it and cannot serve this model. "
            f"{what_to_install('transformers')}"
        )
    return found


def leaves_parameters_out(model: nn.Module) -> bool:
    """Whether a step may leave some trained parameter without a gradient, by the look of the modules.

    Every row runs through all of a dense decoder. Where a layer holds a list of modules (experts), the rows may choose,
    and what is neither in the body nor the head may not run at all.
    """
    decoder = find_decoder(model)
    chooses = any(
        isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1
        for layer in decoder.layers
        for module in layer.modules()
    )
    reached = {id(p) for part in (decoder.body, decoder.causal_lm.get_output_embeddings()) for p in part.parameters()}
    return chooses or any(p.requires_grad and id(p) not in reached for p in model.parameters())


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of `module` run `forward` inside the block; its hooks still fire, whatever else replaced it before."""
    had = "forward" in module.__dict__
    before: Any = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before
        else:
            del module.forward


def keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, permanently, and unpack those that it has repacked.

    On CPUs with AVX512-BF16 it repacks a weight the first time it is used in evaluation mode without gradients. From
    then on, in training mode too, the product with that weight has no backward pass: gradients are silently wrong.
    """
    for module in model.modules():
        linear: Any = module
        if getattr(linear, "support_avx512bf16_for_cpu", False):
            linear.support_avx512bf16_for_cpu = False
            linear.state_dict()  # unpacks the weight in place
