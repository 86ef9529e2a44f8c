"""How the rows of a pass reach attention, in which every token sees others: the protocol, and its plain case.

Between layers, rows are computed one by one and it does not matter where they are. Attention is where texts count: the
masks are made for them, and keys and values have to be those of whole texts. The protocol is implemented plain here,
for several examples in one row in :mod:`tokenseek.ditching.packing` and for texts shared by ranks in
:mod:`tokenseek.parallel.sharding`.

Shapes: B batch, R rows of one pass (selected or unselected), N heads, H head dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, Protocol, TypeAlias

import torch
from typing_extensions import Self

from tokenseek.decoder.attention import Replace, attention_replaced, without_cudnn
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import makes_masks_by_utils, takes_windows, whole_masks
from tokenseek.ditching.rows import Partition
from tokenseek.tiling.rows import Rows
from tokenseek.tiling.tiles import Tile, plain_tiles
from tokenseek.ulysses.heads import Joining

# Arguments of the decoder's body, and what it is called inside of.
BodyCall: TypeAlias = tuple[dict[str, Any], AbstractContextManager[None]]


class Reach(Protocol):
    """How the rows of `parts` reach attention and come back.

    Attributes:
        parts: the rows that layers run on.
        whole: the rows that attention sees.
        joins_in_attention: keys and values of the passes meet in attention, and not in the cache before it.
    """

    joins_in_attention: bool

    @property
    def parts(self) -> Partition: ...

    @property
    def whole(self) -> Partition: ...

    def body_call(self, decoder: Decoder, arguments: dict[str, Any]) -> BodyCall:
        """How the decoder's body, which makes the masks, is called: with which arguments, and inside of what."""

    def replacement(self, rows: Rows, make: Callable[[Rows], Replace]) -> Replace:
        """What attention is replaced with in the pass of `rows` of `whole`, made by `make` of rows of one text."""

    def tiles(self, rows: Rows, size: int) -> Sequence[Tile]:
        """Tiles of at most `size` of `rows` of `parts`, made once a step."""

    def to_attention(self, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one pass, of rows of `parts`, as attention sees them."""

    def attention(
        self, decoder: Decoder, replace: Replace | None, cache: Joining | None
    ) -> AbstractContextManager[None]:
        """What one pass of one layer runs in, with attention replaced unless `replace` is None.

        Args:
            cache: of that pass, by which keys and values of both meet; None where attention is given those that its
                rows attend to.
        """

    def enter_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        """`rows` of `parts` on their way into a layer, but the first."""

    def leave_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        """`rows` of `parts` on their way out of a layer, but the last."""


class PlainReach:
    """Of a batch of one text a row, on one process: rows are where attention looks for them."""

    joins_in_attention = False

    def __init__(self, parts: Partition) -> None:
        self.parts = parts

    @property
    def whole(self) -> Partition:
        return self.parts

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device; what the host knows is kept."""
        return self._with(self.parts.to(device, non_blocking))

    def pin_memory(self) -> Self:
        return self._with(self.parts.pin_memory())

    def _with(self, parts: Partition) -> Self:
        moved = copy(self)
        moved.parts = parts
        return moved

    def body_call(self, decoder: Decoder, arguments: dict[str, Any]) -> BodyCall:
        if not self.parts.right_padded or arguments.get("position_ids") is not None:
            return arguments, nullcontext()
        # No token looks at padding behind it: causality is all the mask that is needed.
        if makes_masks_by_utils(decoder):
            # Without a mask, Transformers would look for packed examples, for which the host waits for the device.
            masks = whole_masks(decoder, self.parts.tokens, None, None, windows=takes_windows(decoder))
            return arguments | {"attention_mask": self.parts.ones_BT}, masks
        return {name: value for name, value in arguments.items() if name != "attention_mask"}, nullcontext()

    def replacement(self, rows: Rows, make: Callable[[Rows], Replace]) -> Replace:
        return make(rows)

    def tiles(self, rows: Rows, size: int) -> Sequence[Tile]:
        return plain_tiles(rows, size)

    def to_attention(self, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys_BNRH, values_BNRH

    def attention(
        self, decoder: Decoder, replace: Replace | None, cache: Joining | None
    ) -> AbstractContextManager[None]:
        return without_cudnn() if replace is None else attention_replaced(decoder.causal_lm, replace)

    def enter_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        return hidden_BRD

    def leave_layer(self, rows: Rows, hidden_BRD: torch.Tensor) -> torch.Tensor:
        return hidden_BRD
