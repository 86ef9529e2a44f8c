"""Adapters of PEFT, made by their configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tokenseek.config import PeftSettings
from tokenseek.decoder.find import find_causal_lm, find_layers
from tokenseek.decoder.names import cache_argument
from tokenseek.errors import UserError

if TYPE_CHECKING:  # half of all that scoring would import, which needs no adapters
    from peft import PeftModel


def add_adapter(
    model: PreTrainedModel, settings: PeftSettings, *, revision: str | None = None, without_weights: bool = False
) -> PeftModel:
    """Wrap the model in a new adapter; its base weights are frozen.

    Args:
        revision: of the model on the hub, which the adapter names with it.
        without_weights: make the adapter on the meta device, to see whether it fits.

    Raises:
        UserError: a method or setting that PEFT does not have, or that does not fit the modules of this model.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType, get_peft_model

    method = PeftType(settings.method.upper())
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    known = {field.name for field in fields(config_class)}
    if method not in PEFT_TYPE_TO_TUNER_MAPPING or "target_modules" not in known:
        raise UserError(
            f"peft.method: {settings.method} is not an adapter that can be added to a model's layers; use lora, loha, "
            "lokr, ia3, ..."
        )
    target_modules = _target_modules(model, settings.target_modules)
    options = dict(settings.extra, task_type="CAUSAL_LM", target_modules=target_modules)
    # PEFT's methods name the same three things differently.
    names = {"r": ("r",), "alpha": ("lora_alpha", "alpha"), "dropout": ("lora_dropout", "dropout", "rank_dropout")}
    for setting, candidates in names.items():
        value = getattr(settings, setting)
        if value is not None:
            name = next((candidate for candidate in candidates if candidate in known), None)
            if name is None:
                raise UserError(f"peft.{setting}: {settings.method} has no such setting; leave it out.")
            options[name] = value
    if unknown := set(options) - known:
        raise UserError(f"peft.extra: {settings.method} takes no {sorted(unknown)}; it takes {sorted(known)}.")
    # GPT-2's layers are of this kind, whose weights are transposed; PEFT finds out too, and warns.
    if "fan_in_fan_out" in known and any(isinstance(module, Conv1D) for module in model.modules()):
        options.setdefault("fan_in_fan_out", True)
    if settings.method == "ia3" and "feedforward_modules" not in options:
        options["feedforward_modules"] = _feed_forward_among(model, target_modules)
    try:
        return get_peft_model(model, config_class(**options), revision=revision, low_cpu_mem_usage=without_weights)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"peft: {settings.method} does not fit {type(model).__name__}: {error}") from error


def _feed_forward_among(model: PreTrainedModel, target_modules: str | list[str]) -> list[str]:
    """Those of the target modules that lie outside attention, where IA3 scales what enters and not what leaves."""
    names = _linear_modules(model, attention=False)
    if isinstance(target_modules, str):  # all-linear
        return names
    return [target for target in target_modules if any(f".{name}".endswith(f".{target}") for name in names)]


def _target_modules(model: PreTrainedModel, target: str | list[str]) -> str | list[str]:
    groups = {"feed_forward": (False,), "attention": (True,), "all-linear": (False, True)}
    of_text_alone = model.config.get_text_config() is not model.config
    if isinstance(target, list) or (target == "all-linear" and not of_text_alone):
        return target
    names = [name for attention in groups[target] for name in _linear_modules(model, attention)]
    if of_text_alone:  # modules of other modalities may have the same names
        _, layers = find_layers(find_causal_lm(model))
        within = {id(module) for layer in layers for module in layer.modules()}
        names = [
            path
            for path, module in model.named_modules()
            if id(module) in within and any(f".{path}".endswith(f".{name}") for name in names)
        ]
    if not names:
        raise UserError(
            f"peft.target_modules: {target} finds no linear layer in {type(model).__name__} (experts are often one "
            "parameter); name the modules in a list."
        )
    return names


def _linear_modules(model: PreTrainedModel, attention: bool) -> list[str]:
    """Names, within a decoder layer, of the linear modules inside its attention, or in its feed-forward layers.

    Those of a layer's state (a state-space mixer, say) are in neither.
    """
    found = set()
    for layer in find_layers(find_causal_lm(model))[1]:
        mixing = tuple(f"{name}." for name, child in layer.named_children() if cache_argument(child))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                in_attention = "attn" in name or "attention" in name
                if in_attention if attention else not (in_attention or name.startswith(mixing)):
                    found.add(name)
    return sorted(found)
