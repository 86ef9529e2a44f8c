"""Adapters whose file alone says what was trained: loaded onto the base model, they are the model that was saved.

Some start by taking a part of the base weights out of them (PiSSA, OLoRA), and loading such an adapter does it again,
with other numbers on another machine or, where it is an iteration, by another random state. Others save a part of what
they need and draw the rest again. Which ones do is not listed here but tried, on one small linear layer.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenseek.config import PeftSettings
from tokenseek.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

_LARGE = 256
# Settings that say where in a model an adapter is, which a model of one layer does not have.
_PLACES = (
    "base_model_name_or_path",
    "modules_to_save", "layers_to_transform", "layers_pattern", "target_parameters", "trainable_token_indices",
    "exclude_modules", "layer_replication", "rank_pattern", "alpha_pattern", "feedforward_modules", "task_type",
)  # fmt: skip


class _OneLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.tried = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tried(x)


def require_portable(adapted: PeftModel, settings: PeftSettings) -> None:
    """Refuse an adapter that, saved and loaded onto the same base model, is another model.

    Args:
        adapted: a model with the adapter, on any device; its weights are not read.

    Raises:
        UserError: the adapter changes the base weights as it starts, or depends on a random state that it does not
            save; or its start needs something that it is not given.
    """
    shape = _shape_of_a_layer(adapted, settings.r or 1)
    if shape is None:  # embeddings alone, or parameters: nothing that starts in an own way
        return
    config = _config_of_one_layer(adapted, settings.extra)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        base = _OneLayer(*shape)
        try:
            changes_base, is_another = _saved_and_loaded(base, config)
        except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError) as error:
            raise UserError(f"peft: {settings.method} cannot start with {_named(settings)}: {error}") from error
    if changes_base:
        raise UserError(
            f"peft: {settings.method} with {_named(settings)} changes the weights of the base model as it starts, so "
            "that its adapter, loaded onto that base model, can be another model than the one that was trained. Leave "
            "it out, or take a start that leaves them alone (lora: init_lora_weights: orthogonal or gaussian)."
        )
    if is_another:
        raise UserError(
            f"peft: {settings.method} with {_named(settings)} depends on a random state that it does not save: its "
            "adapter, loaded again, is another model. Leave it out, or have everything saved (vera and randlora: "
            "save_projection: true)."
        )


def _saved_and_loaded(base: Any, config: Any) -> tuple[bool, bool]:
    """Whether the adapter changes the base weights as it starts; whether it is another model after it is loaded."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    inputs = torch.randn(3, base.tried.in_features)
    saved = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    layer = saved.base_model.model.tried
    changes_base = not torch.equal(layer.get_base_layer().weight, base.tried.weight)
    with torch.no_grad():
        for parameter in saved.parameters():
            if parameter.requires_grad:  # training moves it
                parameter.add_(torch.randn_like(parameter) * 0.1)
        torch.manual_seed(1)
        loaded = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
        set_peft_model_state_dict(loaded, get_peft_model_state_dict(saved))
        is_another = not torch.allclose(saved(inputs), loaded(inputs), rtol=1e-4, atol=1e-5)
    return changes_base, is_another


def _config_of_one_layer(adapted: PeftModel, extra: dict[str, Any]) -> Any:
    """The adapter's configuration for the layer that is tried, with the start that was asked for."""
    config = adapted.peft_config["default"]
    known = {field.name for field in fields(config) if field.init} - set(_PLACES)
    given = {name: getattr(config, name) for name in known if name != "peft_type"} | {
        name: value for name, value in extra.items() if name in known
    }
    if hasattr(config, "feedforward_modules"):
        given["feedforward_modules"] = []
    return type(config)(**{**given, "target_modules": ["tried"], "inference_mode": False})


def _shape_of_a_layer(adapted: PeftModel, rank: int) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that has the adapter, halved until they are small, as the rank permits."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in adapted.modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        weight = getattr(base, "weight", None)
        if weight is not None and weight.dim() == 2 and not isinstance(base, nn.Embedding):
            outputs, inputs = weight.shape
            return _halved(inputs, rank), _halved(outputs, rank)
    return None


def _halved(size: int, rank: int) -> int:
    while size > _LARGE and size % 2 == 0 and size // 2 % rank == 0 and size // 2 >= 2 * rank:
        size //= 2
    return size


def _named(settings: PeftSettings) -> str:
    given = ", ".join(f"{name}: {value}" for name, value in settings.extra.items())
    return f"peft.extra {{{given}}}" if given else "its own defaults"
