"""Where the pieces of a Hugging Face decoder are, found without naming any architecture.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tokenseek.decoder.names import CACHE_ARGUMENTS, cache_argument, shared_argument
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
        mixers: of the layers that carry a state from token to token and have no keys and values (linear attention,
            state-space layers, short convolutions), the module that does it; all else in them is row by row.
        sharing: the layers that attend to the keys and values of a layer below.
    """

    causal_lm: PreTrainedModel
    body: nn.Module
    layers: nn.ModuleList
    cache_argument: str
    mixers: Mapping[nn.Module, nn.Module] = field(default_factory=dict, compare=False)
    sharing: frozenset[nn.Module] = field(default=frozenset(), compare=False)

    @property
    def name(self) -> str:
        """That of the model's class."""
        return type(self.causal_lm).__name__

    @property
    def device(self) -> torch.device:
        """Where token ids are taken: the device of the embeddings."""
        embeddings: Any = self.causal_lm.get_input_embeddings()
        return embeddings.weight.device


def find_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside `model`, plain or wrapped by PEFT or a parallel engine: what ordinary training takes.

    Raises:
        UserError: for anything that is not a causal language model of Transformers.
    """
    causal_lm = unwrapped(model)
    name = type(causal_lm).__name__
    if not isinstance(causal_lm, PreTrainedModel):
        raise UserError(f"{name} is not a Transformers model. Load one with AutoModelForCausalLM.from_pretrained(...).")
    if causal_lm.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model. {_ACCEPTED}")
    if causal_lm.get_output_embeddings() is None or not causal_lm.can_generate():
        raise UserError(f"{name} has no causal language-modelling head. {_ACCEPTED}")
    return causal_lm


def find_layers(causal_lm: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Its body (embeddings, layers and final norm; of a model of several modalities, of the text) and its layers.

    Raises:
        UserError: there is no list of layers in it.
    """
    body = causal_lm.get_decoder()
    # Transformers' last resort, where base_model_prefix names no attribute (Llama-4's text model).
    if body is causal_lm:
        body = getattr(causal_lm, "model", causal_lm)
    layers = _find_layers(body, causal_lm.config.get_text_config().num_hidden_layers)
    if layers is None:
        raise UserError(
            f"{type(causal_lm).__name__}: no list of decoder layers found inside {type(body).__name__}; this model is "
            "not supported."
        )
    return body, layers


def find_decoder(model: nn.Module) -> Decoder:
    """The :class:`Decoder` inside `model`: a Transformers causal LM, plain or wrapped by PEFT or a parallel engine.

    Of a model of several modalities it is that of the text.

    Raises:
        UserError: for anything that is not a causal decoder whose layers have keys and values or a known kind of state.
    """
    if prompt_learning := [c.peft_type for c in getattr(model, "peft_config", {}).values() if c.is_prompt_learning]:
        raise UserError(
            f"{prompt_learning[0]} prepends virtual tokens to every example, so token positions no longer match the "
            "index. Use a PEFT method that keeps the sequence as it is: LoRA, LoHa, LoKr, IA3, OFT, ..."
        )
    causal_lm = find_causal_lm(model)
    name = type(causal_lm).__name__
    if not name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise UserError(f"{name} is not a text-only causal language model. {_ACCEPTED}")
    body, layers = find_layers(causal_lm)
    if any(getattr(module, "is_causal", True) is False for module in body.modules()):
        raise UserError(f"{name} has attention that looks ahead, so it is not a causal decoder. {_ACCEPTED}")
    argument, mixers = _cache_argument(name, layers), _mixers(causal_lm, layers)
    return Decoder(causal_lm, body, layers, argument, mixers, _sharing(causal_lm, layers))


_ACCEPTED = (
    "Accepted: decoder-only models loaded with AutoModelForCausalLM (Llama, Qwen, Mistral, Gemma, GPT-2, ...). "
    "docs/models.md lists them."
)
_ORDINARY = "Ordinary training (training.ditching: false) takes it."
# Kinds of layers, in a config, that carry a state from token to token.
_STATEFUL = ("linear_attention", "mamba", "recurrent", "conv", "ssm")


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside PEFT and parallel engines."""
    while True:
        if base_model := getattr(model, "get_base_model", None):  # PEFT
            model = base_model()
        elif isinstance(inner := getattr(model, "module", None), nn.Module):  # DistributedDataParallel, DeepSpeedEngine
            model = inner
        else:
            return model


def _mixers(causal_lm: PreTrainedModel, layers: nn.ModuleList) -> dict[nn.Module, nn.Module]:
    """By layer, the mixer of those that carry a state.

    Raises:
        UserError: there are such layers, and not each layer has either a mixer or attention alone.
    """
    name, config = type(causal_lm).__name__, causal_lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    kinds = list(kinds) if len(kinds) == len(layers) else [""] * len(layers)
    mixers = {}
    for layer, kind in zip(layers, kinds, strict=True):
        with_cache = [child for child in layer.children() if cache_argument(child)]
        if kind in _STATEFUL and len(with_cache) == 1:
            mixers[layer] = with_cache[0]
        elif (kind in _STATEFUL or mixers or causal_lm._is_stateful) and len(with_cache) != 1:
            parts = " and ".join(type(child).__name__ for child in with_cache) or "neither"
            raise UserError(
                f"{name} has layers with a state (state-space, recurrent or linear attention), and layer "
                f"{len(mixers)} of it is not either such a layer or attention but holds {parts}. Token scoring and "
                f"ditching cannot cut gradients there. {_ORDINARY}"
            )
    if (causal_lm._is_stateful and not mixers) or len(mixers) == len(layers):
        raise UserError(
            f"{name} has no layer with keys and values, or carries a state (state-space, recurrent or linear "
            f"attention) in layers that its config does not name. Its state mixes all tokens, so that no token could "
            f"be left out of the backward pass: token scoring and ditching would save nothing. {_ORDINARY}"
        )
    return mixers


def _sharing(causal_lm: PreTrainedModel, layers: nn.ModuleList) -> frozenset[nn.Module]:
    """The layers that attend to keys and values of layers below, which are handed on in an argument.

    Raises:
        UserError: these layers are not handed them so, or hidden states are several per token.
    """
    name, config = type(causal_lm).__name__, causal_lm.config.get_text_config()
    if getattr(config, "altup_num_inputs", 1) > 1:
        raise UserError(
            f"{name} passes {config.altup_num_inputs} hidden states per token from layer to layer (Gemma 3n), which "
            f"token scoring and ditching do not support. {_ORDINARY}"
        )
    sharing = frozenset(layer for layer in layers if any(_shares(module) for module in layer.modules()))
    if without := [layer for layer in sharing if shared_argument(layer) is None]:
        raise UserError(
            f"{name} has {len(without)} layers that share the keys and values of layers below and are not handed them "
            f"in an argument that is known here. Token scoring and ditching do not support them. {_ORDINARY}"
        )
    return sharing


def _shares(module: nn.Module) -> bool:
    return bool(getattr(module, "is_kv_shared_layer", False))


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
            f"{', '.join(CACHE_ARGUMENTS)}); TokenSeek reaches keys and values through it, so this model is not "
            f"supported. {what_to_install('transformers')}"
        )
    return found


def leaves_parameters_out(model: nn.Module) -> bool:
    """Whether a step may leave some trained parameter without a gradient, by the look of the modules.

    Every row runs through all of a dense decoder. Where a layer holds a list of modules (experts), the rows may choose;
    layers that take over keys and values may have projections of their own all the same; and what is neither in the
    body nor the head may not run at all.
    """
    causal_lm = find_causal_lm(model)
    lists = [module for module in causal_lm.modules() if _holds_several(module)]
    chooses = any(_holds_several(inner) for each in lists for inner in each.modules() if inner is not each)
    shares = any(getattr(module, "is_kv_shared_layer", False) for module in causal_lm.modules())
    parts = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    reached = {id(p) for part in parts for p in part.parameters()}
    return chooses or shares or any(p.requires_grad and id(p) not in reached for p in model.parameters())


def _holds_several(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1


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
