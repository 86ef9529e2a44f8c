"""Token ditching (Algorithm 1 of the paper) for any causal LM of Transformers, switched on in place.

Each decoder layer runs its untouched code twice: over the unselected rows without gradient and, in the middle of that,
over the selected rows with gradient. A row is computed once and only selected rows store activations. Between layers,
the selected rows travel the model's own path (so that hooks of DDP, ZeRO and FSDP2 see a usual graph) and the
unselected rows wait aside.

Shapes: B batch, T tokens, S selected, U unselected, D hidden, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from tokenseek.decoder.attention import require_masked_backend
from tokenseek.decoder.find import find_decoder, keep_4bit_differentiable
from tokenseek.ditching.body import body_forward
from tokenseek.ditching.embedding import forget_tied_weights
from tokenseek.ditching.layer import layer_forward
from tokenseek.ditching.model import make_causal_lm_forward
from tokenseek.ditching.seeking import Seeking
from tokenseek.ditching.state import Ditching, ditching_of
from tokenseek.ditching.storage import STORAGES
from tokenseek.ditching.zero3 import gather_layers_once, ungather_layers
from tokenseek.errors import UserError
from tokenseek.tiling.tiles import require_tile_rows
from tokenseek.versions import tell_of_untested


def enable_token_ditching(
    model: nn.Module,
    *,
    recompute: bool = False,
    kv_storage: str = "device",
    tile_rows: int | str = "auto",
    seeking: Seeking | None = None,
) -> nn.Module:
    """Let `model` train on selected tokens only; patches it in place and returns it.

    Afterwards ``model(input_ids=..., attention_mask=..., labels=..., selected_positions=...)`` back-propagates through
    the selected positions alone (Eq. 6) and its ``.loss`` is the mean cross-entropy over selected supervised positions:
    position t predicts token t + 1 and counts if it is selected and ``labels[t + 1]`` is not -100. With
    ``num_items_in_batch`` the sum is divided by that instead, as Transformers' own losses do; ``selected_weights``
    [B, S] makes sum and mean weighted ones. ``.logits`` is None, or [B, S, V] when no labels are given. Without
    ``selected_positions`` the model is what it was.

    ``model(input_ids=..., labels=..., selection=rule, selection_keys=...)`` needs no index: it runs all tokens without
    gradient, scores them, selects by `rule`, a :class:`tokenseek.SelectionRule`, with draws keyed by one int64 for each
    example, and back-propagates through what it selected. The output also has ``.loss_all``, the mean loss of all
    supervised tokens, ``.selected_positions`` and ``.selected_weights``. ``.loss`` is the weighted sum over selected
    supervised positions divided by the number of all supervised ones, or by ``num_items_in_batch``.

    Args:
        model: a causal LM, plain or PEFT-wrapped, before or after it is wrapped for data parallelism.
        recompute: run the selected rows of each layer once more in the backward pass instead of storing their
            activations; keys and values are then all that a layer stores. ``activation_checkpointing_enable()``
            means the same.
        kv_storage: where the keys and values of all tokens wait for the backward pass: "device"; "host", copied to and
            from pinned memory; or "int8", 8 bits a number and a scale for each token and head, with which gradients are
            no longer exact (docs/performance.md says by how much); or both, "int8_host".
        tile_rows: how many unselected rows run at once. Nothing of them is kept, so a layer need not hold them all;
            queries, keys and values are then projected twice. "auto" takes 2048 where there are at least 4096.
        seeking: how tokens are scored with ``selection``; by default by the gradient at the last layer's input and,
            with rules that draw by it alone and weigh (``SelectionRule()`` does), with one exact layer.

    Raises:
        UserError: for models that token ditching does not support, saying why.

    Example:
        >>> model = tokenseek.enable_token_ditching(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"))
        >>> model(input_ids=ids, labels=ids, selected_positions=torch.tensor([[3, 7, 9]])).loss.backward()
    """
    if kv_storage not in STORAGES:
        raise UserError(f"kv_storage is {kv_storage!r}; it must be one of {', '.join(STORAGES)}.")
    require_tile_rows(tile_rows)
    tell_of_untested(partial(warnings.warn, stacklevel=3))
    decoder = find_decoder(model)
    require_masked_backend(decoder.causal_lm)
    before = ditching_of(model)
    if before is not None:
        disable_token_ditching(model)
    keep_4bit_differentiable(model)  # an evaluation before or during training would repack them
    ditching = Ditching(decoder, recompute, kv_storage, tile_rows, seeking)
    ditching.sequence = None if before is None else before.sequence
    _replace_forward(decoder.causal_lm, ditching, make_causal_lm_forward(decoder.causal_lm))
    _replace_forward(decoder.body, ditching, body_forward)
    for layer in decoder.layers:
        _replace_forward(layer, ditching, layer_forward)
    gather_layers_once(decoder)
    return model


def disable_token_ditching(model: nn.Module) -> nn.Module:
    """Undo :func:`enable_token_ditching`; the model is then exactly as it was before. Returns it."""
    decoder = find_decoder(model)
    if ditching_of(model) is None:
        raise UserError(f"token ditching is not enabled on this {decoder.name}.")
    patched: tuple[Any, ...] = (decoder.causal_lm, decoder.body, *decoder.layers)
    for module in patched:
        if getattr(module.__dict__.get("forward"), "__func__", None) is not module._token_ditching_forward:
            raise UserError(
                f"{type(module).__name__}.forward was replaced again after token ditching was enabled (mixed precision "
                "of accelerate does that); call accelerator.unwrap_model(model, keep_fp32_wrapper=False) first."
            )
    for module in patched:
        del module.forward
        if module._forward_before_ditching is not None:
            module.forward = module._forward_before_ditching
        del module._token_ditching, module._token_ditching_forward, module._forward_before_ditching
    ungather_layers(decoder)
    forget_tied_weights(decoder)
    return model


def _replace_forward(module: Any, ditching: Ditching, forward: Callable[..., Any]) -> None:
    module._forward_before_ditching = module.__dict__.get("forward")
    module._token_ditching, module._token_ditching_forward = ditching, forward
    # A bound method, unlike a closure, follows the module when it is copied.
    module.forward = MethodType(forward, module)
