"""Algorithm 1 of the paper in one decoder layer: its untouched code runs over the unselected rows without gradient and,
in the middle of that, over the selected rows with gradient.

Shapes: B batch, T tokens, S selected, U unselected, D hidden.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokenseek.decoder.attention import Replace, replacement_in_force
from tokenseek.decoder.names import MASK_ARGUMENTS, shared_argument, without_checkpointing
from tokenseek.ditching.attention import selected_attention, unselected_attention
from tokenseek.ditching.autocast import autocast_cache
from tokenseek.ditching.cache import KeysAndValuesSeen, SelectedCache, UnselectedCache, _OnceCache
from tokenseek.ditching.mixer import MixerSeam, recording_input
from tokenseek.ditching.projected import ProjectedAgain
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.recorded import RecordedCache, RecordingCache
from tokenseek.ditching.rows import Rows
from tokenseek.ditching.state import Ditching, argument_names, original_forward
from tokenseek.ditching.storage import TakenOnce, saved_as_kept
from tokenseek.ditching.tiles import ProjectedCache, TiledLayer, tile_attention, tiles_of
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
    mixer = ditching.decoder.mixers.get(layer)
    seen: list[torch.Tensor] = []

    def make_cache() -> RecordingCache | None:
        # A layer that shares keys and values, or has none, puts nothing into a cache.
        return None if mixer or layer in ditching.decoder.sharing else RecordingCache(recorder.exchange)

    def call(hidden: torch.Tensor, cache: RecordingCache | None) -> Any:
        return original_forward(layer)(hidden, **arguments, **{ditching.decoder.cache_argument: cache})

    cache = make_cache()
    with recording_input(mixer, seen) if mixer else nullcontext():
        if layer in recorder.scored:
            outputs = []

            def run(leaf: torch.Tensor) -> torch.Tensor:
                outputs.append(call(leaf, cache))
                return _hidden_states(outputs[0])

            if recorder.top is not None:
                replace = replacement_in_force(ditching.decoder.causal_lm)
                recorder.top.put(layer, hidden, lambda hidden: call(hidden, make_cache()), replace)
            hidden = recorder.run_scored(layer, run, hidden)
            output = (hidden, *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden
        else:
            output = call(hidden, cache)
    if cache is not None:
        _require_updated(cache, layer, ditching)
        recorder.put(layer, cache.keys, cache.values)
    elif seen:
        recorder.put(layer, seen[0])
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

    mixer = ditching.decoder.mixers.get(layer)
    seam_of_mixer = MixerSeam(mixer, reach) if mixer else None
    shares, shared = layer in ditching.decoder.sharing, shared_argument(layer)

    def shrunk_to(rows: Rows) -> dict[str, Any]:
        # Only an attention function of ours knows the rows; a model that has its own needs the mask in full. A mixer
        # sees all tokens, and their mask.
        return {
            name: value if mixer and name in MASK_ARGUMENTS else rows.shrink(name, value, attention_is_ours)
            for name, value in arguments.items()
        }

    # Made once, outside of what is recomputed: some models hand layers an argument that has a gradient.
    with torch.set_grad_enabled(with_gradient):
        arguments_of_selected = shrunk_to(parts.selected)
    if shared:
        arguments_of_selected[shared] = step.shared  # the others' have no gradient

    def run(hidden: torch.Tensor, rows: Rows, cache: _OnceCache | None, replace: Replace | None) -> Any:
        shrunk = arguments_of_selected if rows is parts.selected else shrunk_to(rows)
        attention = reach.attention(ditching.decoder, replace if attention_is_ours else None)
        with without_checkpointing(layer), attention:
            return original_forward(layer)(hidden, **shrunk, **{ditching.decoder.cache_argument: cache})

    def run_selected_alone(hidden: torch.Tensor, recorded_BTD: torch.Tensor | None = None) -> Any:
        """Of a layer with a mixer, or one that takes over the keys and values of another."""
        if not seam_of_mixer:
            return run(hidden, parts.selected, None, reach.replacement(reach.whole.selected, selected_attention))
        seam_of_mixer.recorded_BTD = recorded_BTD
        with seam_of_mixer.in_selected_pass():
            output = run(hidden, parts.selected, None, None)
        seam_of_mixer.require_run(layer)
        return output

    def run_selected(
        hidden: torch.Tensor, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        if mixer or shares:
            return run_selected_alone(hidden, keys), None, None
        cache = (SelectedCache if step.recording is None else RecordedCache)(reach, keys, values)
        replace = reach.replacement(reach.whole.selected, selected_attention)
        # What is recomputed saves nothing until then.
        moves_kv = ditching.kv_storage != "device" and with_gradient and not checkpointing
        with saved_as_kept(lambda: (cache.keys, cache.values), ditching.kv_storage) if moves_kv else nullcontext():
            output = run(hidden, parts.selected, cache, replace)
        _require_updated(cache, layer, ditching)
        return output, cache.keys, cache.values

    def run_unselected_alone(hidden_BUD: torch.Tensor) -> torch.Tensor:
        """Of a layer that takes over the keys and values of another."""
        outputs = []
        for tile in tiles_of(reach, ditching.tile_rows, checkpointing) or ():
            replace = tile_attention(tile, lambda: None)
            outputs.append(_hidden_states(run(tile.take(hidden_BUD), tile.rows, None, replace)))
        if outputs:
            return torch.cat(outputs, dim=1)
        attend = partial(unselected_attention, on_call=lambda: None)
        replace = reach.replacement(reach.whole.unselected, attend)
        return _hidden_states(run(hidden_BUD, parts.unselected, None, replace))

    def selected_pass(*keys_and_values: torch.Tensor, projected: ProjectedAgain | None = None) -> Any:
        with torch.set_grad_enabled(with_gradient), autocast_cache(caches_casts):
            if not (checkpointing and with_gradient):
                return run_selected(selected_BSD, *keys_and_values)
            if projected is not None and projected.keep_instead_of(keys_and_values):
                take = projected.take
            else:
                kept = [TakenOnce(rows, ditching.kv_storage) for rows in keys_and_values]

                def take() -> Any:
                    return [rows.take() for rows in kept]

            return checkpoint(lambda hidden: run_selected(hidden, *take()), selected_BSD, use_reentrant=False)

    if step.recording is not None:
        return selected_pass(*step.recording.take(layer))[0]
    if parts.unselected is None:
        return selected_pass()[0]
    # An engine that casts what enters a layer does not see the rows that wait aside.
    unselected_BUD = step.unselected_BUD.to(selected_BSD)
    if seam_of_mixer:
        outputs = []
        with torch.no_grad(), autocast_cache(False):
            try:
                with seam_of_mixer.in_unselected_pass(lambda: outputs.append(selected_pass()[0]), stop=is_last):
                    step.unselected_BUD = _hidden_states(run(unselected_BUD, parts.unselected, None, None))
            except KeysAndValuesSeen:
                step.unselected_BUD = None
        seam_of_mixer.require_run(layer)
        return outputs[0]
    if shares:
        output = selected_pass()[0]
        with torch.no_grad(), autocast_cache(False):
            step.unselected_BUD = None if is_last else run_unselected_alone(unselected_BUD)
        return output
    tiles = tiles_of(reach, ditching.tile_rows, checkpointing)

    def project(hidden_BUD: torch.Tensor) -> Any:
        if tiles:
            return TiledLayer(layer, tiles, hidden_BUD, run).keys_and_values()
        cache = ProjectedCache()
        with suppress(KeysAndValuesSeen):
            run(hidden_BUD, parts.unselected, cache, lambda original: original)
        return cache.keys, cache.values

    projected = None
    is_plain = isinstance(reach, PlainReach) and not shared and ditching.kv_storage in ("device", "host")
    if checkpointing and with_gradient and is_plain:
        projected = ProjectedAgain(project, unselected_BUD, ditching.kv_storage)
    if tiles:
        with torch.no_grad(), autocast_cache(False):
            tiled = TiledLayer(layer, tiles, unselected_BUD, lambda *given: _hidden_states(run(*given)))
            output, *keys_and_values = selected_pass(*tiled.keys_and_values(), projected=projected)
            tiled.keeps_input = projected is not None and projected.is_used
            step.unselected_BUD = None if is_last else tiled.finish(*keys_and_values)
            if attention_is_ours and not (is_last or tiled.attended):
                raise _attends_otherwise(layer, ditching)
        return output
    seam = UnselectedCache(lambda *rows: selected_pass(*reach.exchange(*rows), projected=projected), stop=is_last)
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
