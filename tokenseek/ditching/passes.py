"""Algorithm 1 of the paper in one decoder layer: its untouched code runs over the unselected rows without gradient and,
in the middle of that, over the selected rows with gradient.

Where the middle is depends on the kind of layer: at the keys and values of one with attention, at the inputs of a mixer
that carries a state; a layer that takes over the keys and values of another has none, and its passes follow each other.
Where the unselected rows have run before, the selected ones run alone, beside what was recorded.

Shapes: B batch, T tokens, S selected, U unselected, R rows of one pass, N key/value heads, H head dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokenseek.decoder.attention import Replace, attends_otherwise
from tokenseek.decoder.names import MASK_ARGUMENTS, shared_argument, without_checkpointing
from tokenseek.ditching.attention import selected_attention, unselected_attention
from tokenseek.ditching.autocast import autocast_cache
from tokenseek.ditching.cache import JoiningCache, SelectedCache, UnselectedCache
from tokenseek.ditching.converted import converted_once
from tokenseek.ditching.mixer import MixerSeam
from tokenseek.ditching.projected import ProjectedAgain
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.recorded import RecordedCache
from tokenseek.ditching.side_by_side import SideBySide
from tokenseek.ditching.state import Ditching, Step, original_forward
from tokenseek.ditching.storage import TakenOnce, saved_as_kept
from tokenseek.ditching.tiles import tiles_of
from tokenseek.ditching.window import seen_rows
from tokenseek.tiling.cache import KeysAndValuesSeen, OnceCache, ProjectedCache
from tokenseek.tiling.rows import Rows
from tokenseek.tiling.tiles import Tile, TiledLayer

# The layer's output for the selected rows and, where it has keys and values, those of all tokens, [B, N, T, H] each.
PassOutput: TypeAlias = tuple[Any, tuple[torch.Tensor, ...]]


def run_both_passes(
    layer: nn.Module,
    ditching: Ditching,
    step: Step,
    selected_BSD: torch.Tensor,
    arguments: dict[str, Any],
    is_last: bool,
) -> Any:
    """The layer's output for the selected rows; moves ``step.unselected_BUD`` through the layer too.

    Args:
        arguments: of the layer's forward, for all tokens, without hidden states and cache.
        is_last: nobody needs this layer's unselected rows; they end where the selected ones have run.
    """
    code = LayerCode(layer, ditching, step, arguments)
    kind = _kind_of(code)
    selected_pass = SelectedPass(kind, code, selected_BSD)
    with converted_once(layer, torch.is_grad_enabled(), code.recomputed):
        if step.recording is not None:
            return selected_pass(*step.recording.take(layer))[0]
        if code.parts.unselected is None:
            return selected_pass()[0]
        assert step.unselected_BUD is not None, "set by the first layer, given up by the last"
        # An engine that casts what enters a layer does not see the rows that wait aside.
        unselected_BUD = step.unselected_BUD.to(selected_BSD)
        with torch.no_grad(), autocast_cache(False):
            output, step.unselected_BUD = kind.run_both(selected_pass, unselected_BUD, stop=is_last)
        return output


def hidden_states(layer_output: Any) -> torch.Tensor:
    """Those of what a layer returns: itself, or the first of a tuple."""
    hidden: torch.Tensor = layer_output[0] if isinstance(layer_output, tuple) else layer_output
    return hidden


class LayerCode:
    """A layer's own forward, called on some of the rows for which it was called.

    The graph holds on to it where the layer is recomputed, so that it holds no hidden states.
    """

    def __init__(self, layer: nn.Module, ditching: Ditching, step: Step, arguments: dict[str, Any]) -> None:
        self.layer, self.ditching, self.step = layer, ditching, step
        self.decoder, self.reach, self.parts = ditching.decoder, step.reach, step.reach.parts
        self.recomputed, self.attention_is_ours = layer in step.recomputed, ditching.attention_is_ours
        self.mixer = self.decoder.mixers.get(layer)
        self.shared = shared_argument(layer)
        # Where what is kept of this layer for the backward pass has its place.
        self.board = step.shelf.board()
        self._arguments = arguments
        # Made once, outside of what is recomputed: some models hand layers an argument that has a gradient.
        self._of_selected = self._shrunk_to(self.parts.selected)
        if self.shared is not None:
            self._of_selected[self.shared] = step.shared  # the others' have no gradient

    def __call__(self, hidden_BRD: torch.Tensor, rows: Rows, cache: OnceCache | None, replace: Replace | None) -> Any:
        """The layer's output for `rows`, whose keys and values go through `cache`.

        Args:
            replace: takes the place of the attention function, where that is ours to replace.
        """
        shrunk = self._of_selected if rows is self.parts.selected else self._shrunk_to(rows)
        joining = cache if isinstance(cache, JoiningCache) else None
        attention = self.reach.attention(self.decoder, replace if self.attention_is_ours else None, joining)
        with without_checkpointing(self.layer), attention:
            return original_forward(self.layer)(hidden_BRD, **shrunk, **{self.decoder.cache_argument: cache})

    def run_selected(self, hidden_BSD: torch.Tensor, cache: OnceCache | None, order: SideBySide | None = None) -> Any:
        """
        Args:
            order: of keys and values; that of the text by default.
        """
        attended: list[bool] = []
        attend = partial(selected_attention, on_call=lambda: attended.append(True), order=order)
        replace = self.reach.replacement(self.reach.whole.selected, attend)
        output = self(hidden_BSD, self.parts.selected, cache, replace)
        self.require_attended(bool(attended))
        return output

    def run_unselected(
        self, hidden_BUD: torch.Tensor, cache: OnceCache | None, on_attention: Callable[[], None] = lambda: None
    ) -> Any:
        """
        Args:
            on_attention: called when the layer calls its attention function, if that is ours.
        """
        attending = self.reach.whole.unselected
        assert attending is not None and self.parts.unselected is not None, "there are unselected rows"
        replace = self.reach.replacement(attending, partial(unselected_attention, on_call=on_attention))
        return self(hidden_BUD, self.parts.unselected, cache, replace)

    def require_attended(self, attended: bool) -> None:
        """Raise UserError where the layer should have called an attention function of ours, and has not."""
        if self.attention_is_ours and not attended:
            raise attends_otherwise(self.layer, self.decoder)

    def tiles(self) -> Sequence[Tile] | None:
        """Of the unselected rows; None where they run at once."""
        return tiles_of(self.reach, self.ditching.tile_rows, self.recomputed)

    def seen(self, count: int) -> torch.Tensor | None:
        """Which of `count` rows of keys and values (unselected ones, or all) selected rows look at; None: all."""
        if self.mixer is not None:
            return None
        masks = [self._arguments.get(name) for name in MASK_ARGUMENTS]
        return seen_rows(self.reach, next((mask for mask in masks if mask is not None), None), count)

    def order(self) -> SideBySide | None:
        """In which keys and values lie; None for that of the text, if anyone but our attention looks at them."""
        is_plain = type(self.reach) is PlainReach and self.attention_is_ours and self.step.recording is None
        is_kept_whole = self.ditching.kv_storage == "device" and not self.decoder.sharing
        is_causal = all(self._arguments.get(name) is None for name in MASK_ARGUMENTS)
        if not (is_plain and is_kept_whole and is_causal) or self.tiles():
            return None
        return SideBySide.of(self.parts)

    def _shrunk_to(self, rows: Rows) -> dict[str, Any]:
        # Only an attention function of ours knows the rows; a model that has its own needs the mask in full. A mixer
        # sees all tokens, and their mask.
        return {
            name: value if self.mixer and name in MASK_ARGUMENTS else rows.shrink(name, value, self.attention_is_ours)
            for name, value in self._arguments.items()
        }


class KindOfLayer(Protocol):
    """How both passes of a layer meet."""

    def run_selected(self, hidden_BSD: torch.Tensor, *given: torch.Tensor) -> PassOutput:
        """The selected rows through the layer, as often as they are recomputed.

        Args:
            given: keys and values of the unselected rows, or what was recorded of all.
        """

    def run_both(
        self, selected_pass: SelectedPass, unselected_BUD: torch.Tensor, stop: bool
    ) -> tuple[Any, torch.Tensor | None]:
        """The layer's output for the selected rows and, unless it is to stop before, the unselected ones [B, U, D].

        Runs without gradient, but for `selected_pass`, which it calls once.
        """


def _kind_of(code: LayerCode) -> KindOfLayer:
    if code.mixer is not None:
        return MixerPasses(code, code.mixer)
    return SharingPasses(code) if code.layer in code.decoder.sharing else AttentionPasses(code)


class SelectedPass:
    """The selected rows' pass, with gradient and autocast as they were where this was made.

    Args:
        selected_BSD: what enters the layer.

    Attributes:
        recomputes: it runs once more in the backward pass.
    """

    def __init__(self, kind: KindOfLayer, code: LayerCode, selected_BSD: torch.Tensor) -> None:
        self._run, self._layer, self._selected_BSD = kind.run_selected, code.layer, selected_BSD
        self._with_gradient, self._caches_casts = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
        self.recomputes, self._code = code.recomputed and self._with_gradient, code

    def __call__(self, *given: torch.Tensor, projected: ProjectedAgain | None = None) -> PassOutput:
        """What :meth:`KindOfLayer.run_selected` returns.

        Args:
            projected: may keep something else than `given` for the backward pass.
        """
        with torch.set_grad_enabled(self._with_gradient), autocast_cache(self._caches_casts):
            run = self._run
            if not self.recomputes:
                return run(self._selected_BSD, *given)
            take, layer = _kept_for_backward(self._code, given, projected), self._layer

            def run_once(hidden_BSD: torch.Tensor) -> PassOutput:
                with converted_once(layer, with_gradient=True, recomputed=True):
                    return run(hidden_BSD, *take())

            output: PassOutput = checkpoint(run_once, self._selected_BSD, use_reentrant=False)
            return output


def _kept_for_backward(
    code: LayerCode, given: tuple[torch.Tensor, ...], projected: ProjectedAgain | None
) -> Callable[[], Sequence[torch.Tensor]]:
    """What gives these tensors to a pass, and to the same pass once more."""
    seen = code.seen(given[0].shape[2]) if given else None
    share = 1.0 if seen is None else len(seen) / given[0].shape[2]
    if projected is not None and projected.keep_instead_of(given, share):
        return projected.take
    kept = [TakenOnce(tensor, code.ditching.kv_storage, code.board, seen) for tensor in given]
    return lambda: [tensor.take() for tensor in kept]


class AttentionPasses:
    """Of a layer with keys and values of its own: the selected rows run as soon as the unselected ones' are known."""

    def __init__(self, code: LayerCode) -> None:
        self.code, self.order = code, code.order()

    def run_selected(self, hidden_BSD: torch.Tensor, *given: torch.Tensor) -> PassOutput:
        code, storage, cache = self.code, self.code.ditching.kv_storage, self._selected_cache(given)
        # What is recomputed saves nothing until then.
        moves_kv = storage != "device" and torch.is_grad_enabled() and not code.recomputed
        seen = code.seen(code.reach.whole.tokens) if moves_kv else None
        saved = lambda: saved_as_kept(lambda: (cache.keys, cache.values), storage, code.board, seen)  # noqa: E731
        with saved() if moves_kv else nullcontext():
            output = code.run_selected(hidden_BSD, cache, self.order)
        return output, cache.given_by(code.layer, code.decoder)

    def _selected_cache(self, given: tuple[torch.Tensor, ...]) -> JoiningCache:
        if self.code.step.recording is not None:
            return RecordedCache(self.code.reach, *given)
        return SelectedCache(self.code.reach, *given, order=self.order)

    def run_both(
        self, selected_pass: SelectedPass, unselected_BUD: torch.Tensor, stop: bool
    ) -> tuple[Any, torch.Tensor | None]:
        tiles = self.code.tiles()
        projected = self._projected_again(tiles, unselected_BUD) if selected_pass.recomputes else None
        if tiles:
            return self._in_tiles(tiles, selected_pass, unselected_BUD, stop, projected)
        return self._at_once(selected_pass, unselected_BUD, stop, projected)

    def _at_once(
        self, selected_pass: SelectedPass, unselected_BUD: torch.Tensor, stop: bool, projected: ProjectedAgain | None
    ) -> tuple[Any, torch.Tensor | None]:
        code, attended = self.code, list[bool]()
        cache = UnselectedCache(code.reach, partial(selected_pass, projected=projected), stop, self.order)
        try:
            output = code.run_unselected(unselected_BUD, cache, on_attention=lambda: attended.append(True))
        except KeysAndValuesSeen:
            return cache.selected_output, None
        except (RuntimeError, AttributeError, LookupError, TypeError):
            # The likelier cause: attention over the wrong shapes, or a use of caches that is not known here.
            cache.given_by(code.layer, code.decoder)
            raise
        cache.given_by(code.layer, code.decoder)
        code.require_attended(bool(attended))
        return cache.selected_output, hidden_states(output)

    def _in_tiles(
        self,
        tiles: Sequence[Tile],
        selected_pass: SelectedPass,
        unselected_BUD: torch.Tensor,
        stop: bool,
        projected: ProjectedAgain | None,
    ) -> tuple[Any, torch.Tensor | None]:
        code = self.code
        tiled = TiledLayer(code.layer, code.decoder, tiles, unselected_BUD, lambda *given: hidden_states(code(*given)))
        given = code.reach.to_attention
        output, keys_and_values = selected_pass(*given(*tiled.keys_and_values()), projected=projected)
        if stop:
            return output, None
        tiled.keeps_input = projected is not None and projected.is_used
        unselected_BUD = tiled.finish(*keys_and_values)
        code.require_attended(tiled.attended)
        return output, unselected_BUD

    def _projected_again(self, tiles: Sequence[Tile] | None, unselected_BUD: torch.Tensor) -> ProjectedAgain | None:
        """What may keep `unselected_BUD` in the place of keys and values; None where these cannot be made again."""
        code, storage = self.code, self.code.ditching.kv_storage
        is_plain = isinstance(code.reach, PlainReach) and not code.shared and storage in ("device", "host")
        project = partial(self._project, tiles)
        return ProjectedAgain(project, unselected_BUD, storage, code.board) if is_plain else None

    def _project(self, tiles: Sequence[Tile] | None, hidden_BUD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, N, U, H] of the unselected rows, without anything else of the layer."""
        code = self.code
        if tiles:
            return TiledLayer(code.layer, code.decoder, tiles, hidden_BUD, code).keys_and_values()
        cache = ProjectedCache()
        with suppress(KeysAndValuesSeen):
            code.run_unselected(hidden_BUD, cache)
        return cache.given_by(code.layer, code.decoder)


class MixerPasses:
    """Of a layer whose mixer carries a state: it runs over all tokens, in the selected pass."""

    def __init__(self, code: LayerCode, mixer: nn.Module) -> None:
        self.code, self.seam = code, MixerSeam(mixer, code.reach)

    def run_selected(self, hidden_BSD: torch.Tensor, *given: torch.Tensor) -> PassOutput:
        self.seam.recorded_BTD = given[0] if given else None
        with self.seam.in_selected_pass():
            output = self.code(hidden_BSD, self.code.parts.selected, None, None)
        self.seam.require_run(self.code.layer)
        return output, ()

    def run_both(
        self, selected_pass: SelectedPass, unselected_BUD: torch.Tensor, stop: bool
    ) -> tuple[Any, torch.Tensor | None]:
        code, rows, outputs = self.code, self.code.parts.unselected, list[Any]()
        assert rows is not None, "there are unselected rows"
        run_selected, moved_BUD = lambda: outputs.append(selected_pass()[0]), None
        with suppress(KeysAndValuesSeen), self.seam.in_unselected_pass(run_selected, stop):
            moved_BUD = hidden_states(code(unselected_BUD, rows, None, None))
        self.seam.require_run(code.layer)
        return outputs[0], moved_BUD


class SharingPasses:
    """Of a layer that attends to the keys and values of a layer below: no pass waits for the other."""

    def __init__(self, code: LayerCode) -> None:
        self.code = code

    def run_selected(self, hidden_BSD: torch.Tensor, *given: torch.Tensor) -> PassOutput:
        return self.code.run_selected(hidden_BSD, None), ()

    def run_both(
        self, selected_pass: SelectedPass, unselected_BUD: torch.Tensor, stop: bool
    ) -> tuple[Any, torch.Tensor | None]:
        output = selected_pass()[0]
        return output, None if stop else self._run_unselected(unselected_BUD)

    def _run_unselected(self, hidden_BUD: torch.Tensor) -> torch.Tensor:
        code = self.code
        if tiles := code.tiles():
            tiled = TiledLayer(code.layer, code.decoder, tiles, hidden_BUD, lambda *given: hidden_states(code(*given)))
            return tiled.finish()
        return hidden_states(code.run_unselected(hidden_BUD, None))
