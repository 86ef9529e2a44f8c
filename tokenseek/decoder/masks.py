"""The masks of attention, made for another text than the rows that the model sees.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    sliding_window_causal_mask_function,
)

from tokenseek.decoder.attention import attention_is_ours
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.names import require_known_mask_function
from tokenseek.errors import UserError

Index: TypeAlias = int | torch.Tensor

# Kernels take a mask as it is where its rows begin at multiples of so many elements, and make a copy otherwise.
MASK_STRIDE = 16


def aligned_mask(mask: torch.Tensor, dtype: torch.dtype, repeats: int = 1) -> torch.Tensor:
    """A mask to be added to the scores, [.., `repeats` * rows, keys], from `mask` [.., rows, keys].

    A boolean one becomes 0 where it is true and -inf elsewhere. Rows follow each other in their order, `repeats` times.
    """
    *batch, rows, keys = mask.shape
    stride = -(-keys // MASK_STRIDE) * MASK_STRIDE
    added = torch.zeros(*batch, repeats, rows, stride, dtype=dtype, device=mask.device)
    within = added[..., :keys]
    if mask.dtype == torch.bool:
        within.masked_fill_(~mask.unsqueeze(-3), float("-inf"))
    else:
        within.copy_(mask.unsqueeze(-3))
    return added.flatten(-3, -2)[..., :keys]


def makes_masks_by_utils(decoder: Decoder) -> bool:
    """Whether the body's masks come from Transformers' masking_utils, as its file suggests."""
    return hasattr(sys.modules[type(decoder.body).__module__], "create_causal_mask")


@dataclass(frozen=True)
class SlidingWindow:
    """Stands for a mask of all rows and keys by which a token looks at itself and at the `size` - 1 tokens before it.

    Only attention functions of ours take one. Any other use of it as a tensor raises.
    """

    size: int

    def seen(self, position_R1: torch.Tensor, key_T: torch.Tensor) -> torch.Tensor:
        """[.., R, T] bool: which keys, by their positions, rows at these positions [.., R, 1] look at."""
        return (key_T <= position_R1) & (key_T > position_R1 - self.size)


def takes_windows(decoder: Decoder) -> bool:
    """Whether a :class:`SlidingWindow` reaches nothing but attention functions of ours.

    A mixer reads its mask, and bodies whose layers share keys and values cut masks to the rows that these run on.
    """
    return attention_is_ours(decoder) and not decoder.mixers and not decoder.sharing


@contextmanager
def whole_masks(
    decoder: Decoder,
    tokens: int,
    attention_mask_BT: torch.Tensor | None,
    position_ids_BT: torch.Tensor | None,
    windows: bool = False,
) -> Iterator[None]:
    """Inside the block, the masks that the model builds are [.., T, T] for the text given here, whatever rows it sees.

    Transformers' rules are followed: examples packed in one row are told apart by jumps in their `position_ids`, unless
    there is an `attention_mask`. The model itself has to be given an `attention_mask`, or it would tell them apart too.

    Args:
        windows: a mask that is a sliding window and nothing else is a :class:`SlidingWindow`.

    Raises:
        UserError: on leaving the block, if no mask was built in it.
    """
    backend = decoder.causal_lm.config.get_text_config()._attn_implementation
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[backend]
    require_known_mask_function(make_mask)
    packed: tuple[torch.Tensor, torch.Tensor] | None = None  # which example of its row a position is in, and its place
    made: list[Callable[..., torch.Tensor]] = []
    if attention_mask_BT is None and position_ids_BT is not None:
        example_BT = begins_anew(position_ids_BT).cumsum(1)
        packed = (example_BT, position_ids_BT) if example_BT[:, -1].any() else None

    def function(
        *,
        batch_size: int,
        mask_function: Callable[..., torch.Tensor],
        q_length: int,
        kv_length: int,
        attention_mask: torch.Tensor | None,
        allow_is_causal_skip: bool = True,
        **more: Any,
    ) -> Any:
        made.append(mask_function)
        if packed is not None:
            examples, positions = (ids_BT.expand(batch_size, -1) for ids_BT in packed)
            by_text = mask_function

            def same_example(batch: Index, head: Index, query: Index, key: Index) -> torch.Tensor:
                return examples[batch, query] == examples[batch, key]

            def within_example(batch: Index, head: Index, query: Index, key: Index) -> torch.Tensor:
                return by_text(batch, head, positions[batch, query], positions[batch, key])

            mask_function, allow_is_causal_skip = and_masks(same_example, within_example), False
        size = more.get("local_size")
        is_alone = windows and allow_is_causal_skip and packed is None and attention_mask_BT is None
        if is_alone and size and size < tokens and _is_same(mask_function, sliding_window_causal_mask_function(size)):
            return SlidingWindow(size)
        return make_mask(
            batch_size=batch_size,
            q_length=tokens,
            kv_length=tokens,
            mask_function=mask_function,
            attention_mask=None if attention_mask_BT is None else attention_mask_BT.bool(),
            allow_is_causal_skip=allow_is_causal_skip,
            **more,
        )

    ALL_MASK_ATTENTION_FUNCTIONS[backend] = function
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[backend] = make_mask
    if not made:
        raise UserError(
            f"{decoder.name} makes its attention masks in code of its own and not in Transformers' masking_utils; they "
            "cannot be made for examples packed in one row, or for a text shared by ranks. Pad the examples "
            "(training.packing: false), or train without sequence parallelism."
        )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions run the same code on the same values, as what one factory makes for the same arguments."""
    if not callable(one) or not callable(other):
        return type(one) is type(other) and isinstance(one, (int, tuple, list)) and _all_same(one, other)
    if getattr(one, "__code__", one) is not getattr(other, "__code__", other):
        return False
    cells = [[cell.cell_contents for cell in getattr(f, "__closure__", None) or ()] for f in (one, other)]
    return _all_same(*cells)


def _all_same(one: Any, other: Any) -> bool:
    if isinstance(one, int):
        return bool(one == other)
    return len(one) == len(other) and all(_is_same(a, b) for a, b in zip(one, other, strict=True))


def begins_anew(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: another example begins here. The first one of a row does not count."""
    return position_ids_BT.diff(dim=1, prepend=position_ids_BT[:, :1] - 1) != 1
