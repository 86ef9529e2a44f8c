"""Algorithm 1 of the paper in one decoder layer: its untouched code runs over the unselected rows without gradient and,
in the middle of that, over the selected rows with gradient.

Shapes: B batch, T tokens, S selected, U unselected, D hidden.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokenseek.decoder.attention import Replace, replacement_in_force
from tokenseek.decoder.names import without_checkpointing
from tokenseek.ditching.attention import selected_attention, unselected_attention
from tokenseek.ditching.autocast import autocast_cache
from tokenseek.ditching.cache import KeysAndValuesSeen, SelectedCache, UnselectedCache, _OnceCache
from tokenseek.ditching.recorded import RecordedCache, RecordingCache
from tokenseek.ditching.rows import Rows
from tokenseek.ditching.state import Ditching, argument_names, original_forward
from tokenseek.ditching.storage import TakenOnce, saved_as_kept
from tokenseek.ditching.tiles import TiledLayer, tiles_of
from tokenseek.errors import UserError
from tokenseek.versions import what_to_install


def layer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    ditching: Ditching = self._token_ditching
    if ditching.recorder is not None:
        return _recorded_layer(self, ditching, args, kwargs)
    if ditching.step is None:
        return original_forward(self)(*args, **kwargs)
    names = argument_names(type(self))
    arguments = dict(zip(names, args, strict=False)) | kwargs
    hidden = arguments.pop(names[0])
    arguments.pop(ditching.decoder.cache_argument, None)

    step, reach = ditching.step, ditching.step.reach
    parts = reach.parts
    top = step.recording and step.recording.top
    if top is not None and top.reached:
        return top.run(self, hidden, self in step.recomputed)
    if not step.started:
        step.started = True
        step.unselected_BUD = parts.unselected and parts.unselected.take(hidden.detach(), 1)
        hidden = parts.selected.take(hidden, 1)
    else:
        hidden = reach.enter_layer(parts.selected, hidden)
        if parts.unselected is not None:
            step.unselected_BUD = reach.enter_layer(parts.unselected, step.unselected_BUD)
    if top is not None and top.holds(self):
        return top.run(self, top.cross_border(hidden), self in step.recomputed)
    is_last = self is ditching.decoder.layers[-1]
    if step.recording is not None and self in step.recording.unrecorded:
        output = step.recording.beyond_border(hidden)
    else:
        output = _run_both_passes(self, ditching, hidden, arguments, is_last)
    hidden = _hidden_states(output)
    if not is_last:
        hidden = reach.leave_layer(parts.selected, hidden)
        if parts.unselected is not None:
            step.unselected_BUD = reach.leave_layer(parts.unselected, step.unselected_BUD)
    elif ditching.returns_all_rows:
        hidden = parts.assemble(None, hidden[:, None])[:, 0]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _recorded_layer(layer: nn.Module, ditching: Ditching, args: tuple, kwargs: dict) -> Any:
    """The layer over all tokens, as it is; its keys and values are kept."""
    names, recorder = argument_names(type(layer)), ditching.recorder
    arguments = dict(zip(names, args, strict=False)) | kwargs
    arguments.pop(ditching.decoder.cache_argument, None)
    hidden = arguments.pop(names[0])

    def call(hidden: torch.Tensor, cache: RecordingCache) -> Any:
        return original_forward(layer)(hidden, **arguments, **{ditching.decoder.cache_argument: cache})

    cache = RecordingCache(recorder.exchange)
    if layer in recorder.scored:
        outputs = []

        def run(leaf: torch.Tensor) -> torch.Tensor:
            outputs.append(call(leaf, cache))
            return _hidden_states(outputs[0])

        if recorder.top is not None:
            replace = replacement_in_force(ditching.decoder.causal_lm)
            recorder.top.put(layer, hidden, lambda hidden: call(hidden, RecordingCache(recorder.exchange)), replace)
        hidden = recorder.run_scored(layer, run, hidden)
        output = (hidden, *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden
    else:
        output = call(hidden, cache)
    _require_updated(cache, layer, ditching)
    recorder.put(layer, cache.keys, cache.values)
    recorder.returns_tuple = isinstance(output, tuple)
    return output


def _run_both_passes(
    layer: nn.Module, ditching: Ditching, selected_BSD: torch.Tensor, arguments: dict, is_last: bool
) -> Any:
    """The layer's output for the selected rows; moves ``step.unselected_BUD`` through the layer too."""
    step, reach = ditching.step, ditching.step.reach
    parts = reach.parts
    with_gradient, caches_casts = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    checkpointing, attention_is_ours = layer in step.recomputed, ditching.attention_is_ours

    def run(hidden: torch.Tensor, rows: Rows, cache: _OnceCache, replace: Replace) -> Any:
        # Only an attention function of ours knows the rows; a model that has its own needs the mask in full.
        shrunk = {name: rows.shrink(name, value, attention_is_ours) for name, value in arguments.items()}
        attention = reach.attention(ditching.decoder, replace if attention_is_ours else None)
        with without_checkpointing(layer), attention:
            return original_forward(layer)(hidden, **shrunk, **{ditching.decoder.cache_argument: cache})

    def run_selected(
        hidden: torch.Tensor, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        cache = (SelectedCache if step.recording is None else RecordedCache)(reach, keys, values)
        replace = reach.replacement(reach.whole.selected, selected_attention)
        # What is recomputed saves nothing until then.
        moves_kv = ditching.kv_storage != "device" and with_gradient and not checkpointing
        with saved_as_kept(lambda: (cache.keys, cache.values), ditching.kv_storage) if moves_kv else nullcontext():
            output = run(hidden, parts.selected, cache, replace)
        _require_updated(cache, layer, ditching)
        return output, cache.keys, cache.values

    def selected_pass(*keys_and_values: torch.Tensor) -> Any:
        with torch.set_grad_enabled(with_gradient), autocast_cache(caches_casts):
            if not (checkpointing and with_gradient):
                return run_selected(selected_BSD, *keys_and_values)
            kept = [TakenOnce(rows, ditching.kv_storage) for rows in keys_and_values]
            return checkpoint(
                lambda hidden: run_selected(hidden, *(rows.take() for rows in kept)), selected_BSD, use_reentrant=False
            )

    if step.recording is not None:
        return selected_pass(*step.recording.take(layer))[0]
    if parts.unselected is None:
        return selected_pass()[0]
    # An engine that casts what enters a layer does not see the rows that wait aside.
    unselected_BUD = step.unselected_BUD.to(selected_BSD)
    if tiles := tiles_of(reach, ditching.tile_rows):
        with torch.no_grad(), autocast_cache(False):
            tiled = TiledLayer(layer, tiles, unselected_BUD, lambda *given: _hidden_states(run(*given)))
            output, *keys_and_values = selected_pass(*tiled.keys_and_values())
            step.unselected_BUD = None if is_last else tiled.finish(*keys_and_values)
            if attention_is_ours and not (is_last or tiled.attended):
                raise _attends_otherwise(layer, ditching)
        return output
    seam = UnselectedCache(lambda *rows: selected_pass(*reach.exchange(*rows)), stop=is_last)
    with torch.no_grad(), autocast_cache(False):
        try:
            calls: list[nn.Module] = []
            attend = partial(unselected_attention, on_call=lambda: calls.append(layer))
            replace = reach.replacement(reach.whole.unselected, attend)
            step.unselected_BUD = _hidden_states(run(unselected_BUD, parts.unselected, seam, replace))
            _require_updated(seam, layer, ditching)
            if attention_is_ours and not calls:
                raise _attends_otherwise(layer, ditching)
        except KeysAndValuesSeen:
            step.unselected_BUD = None
        except (RuntimeError, AttributeError, LookupError, TypeError):
            # The likelier cause: attention over the wrong shapes, or a use of caches that is not known here.
            _require_updated(seam, layer, ditching)
            raise
    return seam.selected_output


def _require_updated(
    seam: SelectedCache | UnselectedCache | RecordingCache, layer: nn.Module, ditching: Ditching
) -> None:
    if seam.keys is None:
        raise UserError(
            f"{type(layer).__name__} in {ditching.decoder.name} does not pass its keys and values through its cache; "
            f"this model is not supported. {what_to_install('transformers')}"
        )


def _attends_otherwise(layer: nn.Module, ditching: Ditching) -> UserError:
    return UserError(
        f"{type(layer).__name__} in {ditching.decoder.name} does not attend by Transformers' AttentionInterface, "
        "although its module suggests it does: load the model with attn_implementation='eager'."
    )


def _hidden_states(layer_output: Any) -> torch.Tensor:
    return layer_output[0] if isinstance(layer_output, tuple) else layer_output
