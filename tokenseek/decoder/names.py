"""Transformers' spellings, which change between its releases: the rest of the package uses no other name for them.

What is installed is found by looking at signatures, fields and attributes, never at version numbers, so that the next
renaming is one more name in one of the tuples below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from tokenseek.errors import UserError
from tokenseek.versions import what_to_install

# The key/value cache among the arguments of layers and models.
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past", "past_key_value")
# Keys and values of layers below, by kind of layer, which some layers take over.
SHARED_ARGUMENTS = ("shared_kv_states",)
# Places in that cache [T], shared by the examples of a batch. Layers pass them on to the cache.
CACHE_PLACES = ("cache_position",)
# What a token may look at, [B | 1, N | 1, T, T].
MASK_ARGUMENTS = ("attention_mask", "causal_mask")
# Biases over the keys alone.
KEY_ARGUMENTS = ("alibi",)
# Outputs of a model, asked for in a call or in its config, that hold every token of a layer.
OUTPUTS_OF_ALL_TOKENS = ("output_attentions", "output_hidden_states", "output_router_logits")
# A layer's flag, the field of TrainingArguments, and the beginning of the names of a model's methods.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
# Where a modelling file keeps attention: the table in which it looks its function up, and its own eager function.
ATTENTION_TABLE = "ALL_ATTENTION_FUNCTIONS"
EAGER_ATTENTION = "eager_attention_forward"
# What Transformers gives a function that makes attention masks, of what has to be replaced for another text.
MASK_FUNCTION_ARGUMENTS = ("batch_size", "q_length", "kv_length", "mask_function", "attention_mask")


def cache_argument(layer: nn.Module) -> str | None:
    """The name of the key/value cache among the arguments of a layer's ``forward``; None where it takes none."""
    return _named_argument(layer, CACHE_ARGUMENTS)


def shared_argument(layer: nn.Module) -> str | None:
    """The name of other layers' keys and values among the arguments of a layer's ``forward``, if it takes any."""
    return _named_argument(layer, SHARED_ARGUMENTS)


def _named_argument(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    # The class's forward, since an instance's own may be a wrapper (accelerate's device hooks, for one).
    parameters = inspect.signature(type(layer).forward).parameters
    return next((name for name in names if name in parameters), None)


def require_known_mask_function(make_mask: Callable) -> None:
    """Raise UserError unless ``make_mask`` is told queries, keys and rule by the arguments that are known here."""
    parameters = inspect.signature(make_mask).parameters
    if missing := [name for name in MASK_FUNCTION_ARGUMENTS if name not in parameters]:
        raise UserError(
            f"Transformers' {make_mask.__name__}({', '.join(parameters)}) takes no {' and no '.join(missing)}, so that "
            f"masks for packed examples or shared texts cannot be made. {what_to_install('transformers')}"
        )


def checkpoints(layer: nn.Module) -> bool:
    """Whether Transformers would recompute this layer in the backward pass."""
    return layer.training and any(getattr(layer, name, False) for name in CHECKPOINTING)


@contextmanager
def without_checkpointing(*modules: nn.Module) -> Iterator[None]:
    """Inside the block, Transformers recomputes none of these modules (it would take layers' key/value cache away)."""
    switched_on = [(module, name) for module in modules for name in CHECKPOINTING if getattr(module, name, False)]
    for module, name in switched_on:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in switched_on:
            setattr(module, name, True)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Have Transformers recompute the model's layers in the backward pass, by torch's non-reentrant checkpointing."""
    _checkpointing_method(model, "enable")({"use_reentrant": False})


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Undo :func:`enable_checkpointing`."""
    _checkpointing_method(model, "disable")()


def _checkpointing_method(model: PreTrainedModel, verb: str) -> Callable:
    found = [getattr(model, f"{name}_{verb}", None) for name in CHECKPOINTING]
    method = next((method for method in found if method is not None), None)
    if method is None:
        raise UserError(
            f"{type(model).__name__} has neither {' nor '.join(f'{name}_{verb}' for name in CHECKPOINTING)}. "
            f"{what_to_install('transformers')}"
        )
    return method


def asks_for_checkpointing(arguments: Mapping[str, Any]) -> bool:
    """Whether these fields of TrainingArguments, in any spelling, ask for layers to be recomputed."""
    return any(arguments.get(name) for name in CHECKPOINTING)


def spelled_for_trainer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TrainingArguments, given in any spelling, in that of the installed Transformers.

    Raises:
        UserError: a field is given in two spellings.
    """
    spelled: dict[str, Any] = {}
    for given, value in arguments.items():
        name = trainer_field(given)
        if name in spelled:
            raise UserError(f"{given} and {name} are two names of one field of TrainingArguments: give one of them.")
        spelled[name] = value
    return spelled


def trainer_field(name: str) -> str:
    """The installed Transformers' spelling of a field of TrainingArguments; unknown names are returned as they are."""
    for prefix in CHECKPOINTING:
        if name in (prefix, f"{prefix}_kwargs"):
            candidates = [other + name.removeprefix(prefix) for other in CHECKPOINTING]
            return next((candidate for candidate in candidates if candidate in trainer_fields()), name)
    return name


@cache
def trainer_fields() -> frozenset[str]:
    """The fields that TrainingArguments takes."""
    return frozenset(field.name for field in fields(TrainingArguments) if field.init)
