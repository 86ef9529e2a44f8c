"""The forward of a decoder layer: as it is, over all tokens with its keys and values kept, or in two passes.

Shapes: B batch, T tokens, S selected, U unselected, R rows of this process, D hidden.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from tokenseek.decoder.attention import replacement_in_force
from tokenseek.ditching.last_layer import run_last_layer
from tokenseek.ditching.mixer import recording_input
from tokenseek.ditching.passes import hidden_states, run_both_passes
from tokenseek.ditching.recorded import Recording, RecordingCache
from tokenseek.ditching.state import Ditching, Step, argument_names, original_forward


def layer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a layer's forward: the original one, unless a step or a recording is under way."""
    ditching: Ditching = self._token_ditching
    if ditching.recorder is None and ditching.step is None:
        return original_forward(self)(*args, **kwargs)
    names = argument_names(self)
    arguments = dict(zip(names, args, strict=False)) | kwargs
    hidden = arguments.pop(names[0])
    arguments.pop(ditching.decoder.cache_argument, None)
    if ditching.recorder is not None:
        return _Recorded(self, ditching, ditching.recorder, arguments).run(hidden)
    assert ditching.step is not None
    return _layer_of_step(self, ditching, ditching.step, hidden, arguments)


def _layer_of_step(
    layer: nn.Module, ditching: Ditching, step: Step, hidden: torch.Tensor, arguments: dict[str, Any]
) -> Any:
    """The layer's output for the selected rows; of all rows [B, R, D] from the border of exact layers on."""
    top = None if step.recording is None else step.recording.top
    if top is not None and top.reached:
        return top.run(layer, hidden, layer in step.recomputed)
    hidden = _enter(step, hidden)
    if top is not None and top.holds(layer):
        return top.run(layer, top.cross_border(hidden), layer in step.recomputed)
    is_last = layer is ditching.decoder.layers[-1]
    if step.recording is not None and layer in step.recording.unrecorded:
        output = step.recording.beyond_border(hidden)
    else:
        output = run_both_passes(layer, ditching, step, hidden, arguments, is_last)
    hidden = hidden_states(output)
    if not is_last:
        hidden = _leave(step, hidden)
    elif ditching.returns_all_rows:
        hidden = step.reach.parts.assemble(None, hidden[:, None])[:, 0]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _enter(step: Step, hidden: torch.Tensor) -> torch.Tensor:
    """The selected rows [B, S, D] on their way into a layer, of all tokens into the first; the unselected ones too."""
    reach, selected, unselected = step.reach, step.reach.parts.selected, step.reach.parts.unselected
    if not step.started:
        step.started = True
        step.unselected_BUD = None if unselected is None else unselected.take(hidden.detach(), 1)
        return selected.take(hidden, 1)
    hidden = reach.enter_layer(selected, hidden)
    if unselected is not None:
        assert step.unselected_BUD is not None
        step.unselected_BUD = reach.enter_layer(unselected, step.unselected_BUD)
    return hidden


def _leave(step: Step, hidden_BSD: torch.Tensor) -> torch.Tensor:
    """The selected rows on their way out of a layer but the last; the unselected ones too."""
    reach, unselected = step.reach, step.reach.parts.unselected
    hidden_BSD = reach.leave_layer(reach.parts.selected, hidden_BSD)
    if unselected is not None:
        assert step.unselected_BUD is not None
        step.unselected_BUD = reach.leave_layer(unselected, step.unselected_BUD)
    return hidden_BSD


class _Recorded:
    """One layer over all tokens, as it is; its keys and values, or what its mixer is given, go to `recorder`."""

    def __init__(self, layer: nn.Module, ditching: Ditching, recorder: Recording, arguments: dict[str, Any]) -> None:
        self.layer, self.ditching, self.recorder, self.arguments = layer, ditching, recorder, arguments
        self.decoder = ditching.decoder
        self.mixer = self.decoder.mixers.get(layer)

    def run(self, hidden_BRD: torch.Tensor) -> Any:
        if tiled := self.recorder.in_tiles(self.layer):
            output, keys_and_values = tiled.run(self.layer, original_forward(self.layer), hidden_BRD, self.arguments)
            self.recorder.put(self.layer, *(keys_and_values or ()))
            self.recorder.returns_tuple = isinstance(output, tuple)
            return output
        cache, seen = self._make_cache(), list[torch.Tensor]()
        with nullcontext() if self.mixer is None else recording_input(self.mixer, seen):
            output = (self._run_scored if self.layer in self.recorder.scored else self._call)(hidden_BRD, cache)
        if cache is not None:
            self.recorder.put(self.layer, *cache.given_by(self.layer, self.decoder))
        elif seen:
            self.recorder.put(self.layer, seen[0])
        self.recorder.returns_tuple = isinstance(output, tuple)
        return output

    def _make_cache(self) -> RecordingCache | None:
        # A layer that shares keys and values, or has none, puts nothing into a cache.
        has_own = self.mixer is None and self.layer not in self.decoder.sharing
        return RecordingCache() if has_own else None

    def _call(self, hidden_BRD: torch.Tensor, cache: RecordingCache | None) -> Any:
        few = self.recorder.few
        if few is not None and self.layer is self.decoder.layers[-1]:
            assert cache is not None, "it has keys and values of its own"
            return run_last_layer(self.ditching, few, hidden_BRD, self.arguments, cache)
        self.recorder.current = cache
        output = original_forward(self.layer)(hidden_BRD, **self.arguments, **{self.decoder.cache_argument: cache})
        self.recorder.current = None  # a recording lives on, with keys and values that nobody asks for
        return output

    def _run_scored(self, hidden_BRD: torch.Tensor, cache: RecordingCache | None) -> Any:
        """With a graph of its own, through which a gradient is taken before the second pass."""
        outputs: list[Any] = []

        def run(leaf: torch.Tensor) -> torch.Tensor:
            outputs.append(self._call(leaf, cache))
            return hidden_states(outputs[0])

        if self.recorder.top is not None:
            replace = replacement_in_force(self.decoder.causal_lm)
            self.recorder.top.put(
                self.layer, hidden_BRD, lambda hidden: self._call(hidden, self._make_cache()), replace
            )
        hidden_BRD = self.recorder.run_scored(self.layer, run, hidden_BRD)
        return (hidden_BRD, *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden_BRD
