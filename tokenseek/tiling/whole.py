"""Passes over all tokens without gradient (scoring, evaluation, the first pass of a step that selects), in tiles.

Shapes: B batch, T tokens, R rows of a tile, D hidden, K key/value heads, H head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tokenseek.decoder.attention import (
    MASKED_BACKENDS,
    Replace,
    attends_otherwise,
    attention_is_ours,
    attention_replaced,
    without_cudnn,
)
from tokenseek.decoder.device import share_memory
from tokenseek.decoder.find import Decoder, forward_replaced
from tokenseek.decoder.head import is_partitioned
from tokenseek.decoder.names import OUTPUTS_OF_ALL_TOKENS
from tokenseek.tiling.cache import OnceCache
from tokenseek.tiling.rows import Rows, Stretch
from tokenseek.tiling.tiles import Extent, PackedTile, PlainTile, Tile, TiledLayer, borders_of_tiles, tile_size


class Text(Protocol):
    """The tokens of a batch that this process computes.

    Attributes:
        shape: examples, and rows of each on this process.
    """

    shape: tuple[int, int]

    def tiles(self, size: int, device: torch.device) -> Sequence[Tile]:
        """Tiles of at most `size` rows."""

    def to_attention(self, keys_BKRH: torch.Tensor, values_BKRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all rows as attention sees them, [B, K, T, H]."""

    def attention(self, decoder: Decoder, replace: Replace, is_ours: bool) -> AbstractContextManager[None]:
        """What a tile's second sweep runs in.

        Args:
            replace: what attention is replaced with, where it is ours to replace.
        """


class PlainText:
    """Of one text a row.

    Args:
        shape: examples, and tokens of each.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def tiles(self, size: int, device: torch.device) -> Sequence[Tile]:
        return [self.tile(*ends, size, device) for ends in borders_of_tiles(self.shape[1], size)]

    def tile(self, first: int, last: int, size: int, device: torch.device) -> Tile:
        """Of the rows [first, last), with masks of at most `size` rows each."""
        extents = [_extents(first, last, size)] * self.shape[0]
        return PlainTile(Stretch(first, last, self.shape, device), first, last, extents)

    def to_attention(self, keys_BKTH: torch.Tensor, values_BKTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys_BKTH, values_BKTH

    def attention(self, decoder: Decoder, replace: Replace, is_ours: bool) -> AbstractContextManager[None]:
        return attention_replaced(decoder.causal_lm, replace) if is_ours else without_cudnn()


def _extents(first: int, last: int, size: int) -> list[Extent]:
    borders = borders_of_tiles(last - first, size)
    return [Extent(row, end - row, first + row, first + end - 1) for row, end in borders]


class PackedText(PlainText):
    """Of one row of several examples, each of which attends alone.

    Args:
        lengths: tokens of each example.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__((1, sum(lengths)))
        self.lengths = lengths

    def tile(self, first: int, last: int, size: int, device: torch.device) -> Tile:
        examples: list[PlainTile | None] = []
        begin = 0
        for length in self.lengths:
            one, end = max(0, first - begin), min(length, last - begin)
            begin += length
            if one >= end:
                examples.append(None)
                continue
            examples.append(PlainTile(Stretch(one, end, (1, length), device), one, end, [_extents(one, end, size)]))
        rows = Stretch(first, last, self.shape, device, leaves_masks=True)
        return PackedTile(rows, first, last, examples, self.lengths)


class Tiled(NamedTuple):
    """A layer's output, as it returns it, and its keys and values [B, K, T, H]; None where it has none of its own."""

    output: Any
    keys_and_values: tuple[torch.Tensor, ...] | None


class TiledPass:
    """One pass over all tokens of a batch, whose layers run in tiles; see :func:`tiled_pass`."""

    def __init__(self, decoder: Decoder, text: Text, size: int, device: torch.device) -> None:
        self.decoder, self.text, self.tiles = decoder, text, text.tiles(size, device)
        self._attention_is_ours = attention_is_ours(decoder)  # which looks at all modules
        self._before: torch.Tensor | None = None  # what the last layer returned: it may be written over

    def takes(self, layer: nn.Module) -> bool:
        """Whether the layer's rows meet in attention alone. A mixer sees all of them at once."""
        return layer not in self.decoder.mixers and not torch.is_grad_enabled()

    def run(
        self, layer: nn.Module, forward: Callable[..., Any], hidden_BTD: torch.Tensor, arguments: dict[str, Any]
    ) -> Tiled:
        """The layer over all tokens.

        Args:
            forward: the layer's.
            arguments: its others, by name, without the cache.
        """
        decoder, is_ours = self.decoder, self._attention_is_ours
        outputs: list[Any] = []

        def run(hidden_BRD: torch.Tensor, rows: Rows, cache: OnceCache | None, replace: Replace) -> torch.Tensor:
            shrunk = {name: rows.shrink(name, value, is_ours) for name, value in arguments.items()}
            with self.text.attention(decoder, replace, is_ours):
                output = forward(hidden_BRD, **shrunk, **{decoder.cache_argument: cache})
            outputs[:] = [output]
            hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return hidden

        tiled = TiledLayer(layer, decoder, self.tiles, hidden_BTD, run)
        tiled.keeps_input = self._before is None or not share_memory(hidden_BTD, self._before)
        keys_and_values = None
        if layer not in decoder.sharing:
            keys_and_values = self.text.to_attention(*tiled.keys_and_values())
        output_BTD = tiled.finish(*(keys_and_values or ()))
        if is_ours and not tiled.attended:
            raise attends_otherwise(layer, decoder)
        self._before = output_BTD
        whole = (output_BTD, *outputs[0][1:]) if isinstance(outputs[0], tuple) else output_BTD
        return Tiled(whole, keys_and_values)


def tiled_pass(decoder: Decoder, text: Text, tile_rows: int | str, recomputed: bool = False) -> TiledPass | None:
    """How a pass over `text` runs in tiles; None where they save nothing, or cannot be.

    They cannot where attention takes no mask of any shape, where outputs of every layer are asked for, and where an
    engine gathers the weights of a layer's parts for each of their calls, of which processes would have different
    numbers.

    Args:
        recomputed: see :func:`tokenseek.tiling.tiles.tile_size`. Who does not recompute is spared tiles of many short
            examples.
    """
    config = decoder.causal_lm.config.get_text_config()
    size = tile_size(tile_rows, *text.shape, recomputed)
    if tile_rows == "auto" and not recomputed:
        size = None if tile_size(tile_rows, 1, text.shape[1]) is None else size
    if size is None or config._attn_implementation not in MASKED_BACKENDS:
        return None
    if any(getattr(config, name, False) for name in OUTPUTS_OF_ALL_TOKENS):
        return None
    if any(_gathers_inside(layer) for layer in decoder.layers):
        return None
    return TiledPass(decoder, text, size, decoder.device)


@contextmanager
def layers_in_tiles(
    decoder: Decoder, text: Text, tile_rows: int | str, whole: Collection[nn.Module] = ()
) -> Iterator[None]:
    """In the block, a pass over `text` runs in tiles those of its layers that run without gradient.

    Args:
        whole: layers that somebody watches, which run as they are.
    """
    tiled = tiled_pass(decoder, text, tile_rows)
    with ExitStack() as stack:
        for layer in decoder.layers:
            if tiled is not None and layer not in whole:
                stack.enter_context(forward_replaced(layer, partial(_forward, tiled, layer, layer.forward)))
        yield


def _forward(tiled: TiledPass, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    if not tiled.takes(layer) or arguments.pop(tiled.decoder.cache_argument, None) is not None:
        return forward(*args, **kwargs)
    return tiled.run(layer, forward, arguments.pop(names[0]), arguments).output


def _gathers_inside(layer: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 gathers weights for a part of the layer, and not for all of it at once."""
    if is_partitioned(layer):
        return not getattr(layer, "_z3_leaf", False)
    return any(isinstance(module, FSDPModule) for module in layer.modules() if module is not layer)
