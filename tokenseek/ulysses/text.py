"""A whole text dealt to ranks, for a plain forward pass in which all tokens are alike; scoring uses it.

Shapes: B batch, T tokens, P ranks, R slots on this rank, N query heads, K key/value heads, k of them on a rank, H head
dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from tokenseek.decoder.attention import Attention, Replace, attention_replaced
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.masks import whole_masks
from tokenseek.tiling.rows import Stretch
from tokenseek.tiling.tiles import SharedTile, Tile, borders_of_tiles, of_first_rows
from tokenseek.tiling.whole import PlainText
from tokenseek.ulysses.heads import SharedAttention, heads_exchanged, keys_to_heads, query_heads
from tokenseek.ulysses.layout import deal


class DealtText:
    """The T tokens of every row of a batch, right-padded or packed, every P-th of them on this rank.

    All ranks have to be given the same batch (:func:`tokenseek.ulysses.agreement.require_same`).

    Args:
        input_ids: [B, T].
        position_ids: [B | 1, T]; by default those of one example a row.
    """

    def __init__(
        self,
        decoder: Decoder,
        group: dist.ProcessGroup,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> None:
        self.decoder, self.group, self.input_ids = decoder, group, input_ids
        self.tokens, device = input_ids.shape[1], input_ids.device
        # One empty slot more on every rank holds the text's last position, which some rotary embeddings depend on.
        positions_1A = pad(torch.arange(self.tokens, device=device)[None], (0, group.size()), value=-1)
        self._positions_PR = deal(positions_1A, group.size()).positions_BPR[0]
        self.empty = self._positions_PR.numel() - self.tokens  # slots of all ranks, behind the last token
        mine_R = self._positions_PR[group.rank()]
        self._is_token_R = mine_R >= 0
        self._mine_R = mine_R.where(self._is_token_R, self.tokens - 1)
        if position_ids is None:
            position_ids = torch.arange(self.tokens, device=device)[None]
        last_B1 = position_ids.amax(1, keepdim=True)
        self._position_ids_BR = position_ids[:, self._mine_R].where(self._is_token_R, last_B1)

    def arguments(self) -> dict[str, torch.Tensor]:
        """What the decoder's body is called with."""
        ids_BR = self.input_ids[:, self._mine_R]
        # A mask of ones keeps the model from reading the jumps between positions as borders of packed examples.
        return dict(
            input_ids=ids_BR,
            position_ids=self._position_ids_BR.expand_as(ids_BR),
            attention_mask=torch.ones_like(ids_BR),
        )

    def mine(self, values_BT: torch.Tensor, fill: float) -> torch.Tensor:
        """[B, R]: of local tokens, `fill` in empty slots."""
        return values_BT[:, self._mine_R].where(self._is_token_R, fill)

    def gathered(self, values_BR: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] of all tokens, on every rank, from everybody's own [B, R, ...]."""
        everyone = [torch.empty_like(values_BR) for _ in range(self.group.size())]
        dist.all_gather(everyone, values_BR.contiguous(), group=self.group)
        # (P, B, R) -> (B, R, P) -> (B, R x P): dealt in turn, so this is the order of the text
        return torch.stack(everyone, dim=2).flatten(1, 2)[:, : self.tokens]

    def averaged(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.group.size()

    @contextmanager
    def attention(
        self,
        replace: Replace,
        on_keys: Callable[..., None] | None = None,
        masked: tuple[int, torch.Tensor | None] | None = None,
    ) -> Iterator[None]:
        """Inside the block, ``replace(original)`` attends from all T tokens to all, with this rank's heads.

        Args:
            on_keys: called in every layer with keys and values [B, k, T, H] of all tokens, this rank's heads.
            masked: the number of tokens that the masks are made for and, where these tell packed examples apart,
                position_ids [B | 1, T]; by default one example of T tokens.
        """
        masked_tokens, position_ids = masked or (self.tokens, None)

        def replace_local(original: Attention) -> Attention:
            of_all_slots = of_first_rows(replace(original), self.empty)
            return SharedAttention(self.decoder, self.group, True, of_all_slots, _WholeText(self.tokens, on_keys))

        with (
            whole_masks(self.decoder, masked_tokens, None, position_ids),
            attention_replaced(self.decoder.causal_lm, replace_local),
        ):
            yield


class TextInTiles:
    """The tokens of a dealt text on this rank, for a pass in tiles (:mod:`tokenseek.tiling.whole`).

    Every rank has as many slots, and so the same tiles. Dealt in turn, a tile's tokens on all ranks follow each other
    in the text.

    Args:
        whole: the text of all ranks.
    """

    def __init__(self, dealt: DealtText, whole: PlainText) -> None:
        self._dealt, self._whole, self._ranks = dealt, whole, dealt.group.size()
        self._slots = (dealt.tokens + dealt.empty) // self._ranks
        self.shape = len(dealt.input_ids), self._slots

    def tiles(self, size: int, device: torch.device) -> Sequence[Tile]:
        tiles, tokens = list[Tile](), self._dealt.tokens
        for first, last in borders_of_tiles(self._slots - 1, size):
            # The spare slot, which holds no token on any rank, goes with the last tile.
            last += last == self._slots - 1
            begin, end = first * self._ranks, last * self._ranks
            of_all_ranks = self._whole.tile(begin, min(end, tokens), size, device)
            mine = Stretch(first, last, self.shape, device)
            tiles.append(SharedTile(mine, first, last, of_all_ranks, max(0, end - tokens)))
        return tiles

    def to_attention(self, keys_BKRH: torch.Tensor, values_BKRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dealt = self._dealt
        keys, values = keys_to_heads(query_heads(dealt.decoder), dealt.group, True, keys_BKRH, values_BKRH)
        return keys[:, :, : dealt.tokens], values[:, :, : dealt.tokens]

    def attention(self, decoder: Decoder, replace: Replace, is_ours: bool) -> AbstractContextManager[None]:
        # Eager attention is replaced too: it is given the tile's queries of all ranks.
        return heads_exchanged(decoder, self._dealt.group, True, replace, None)


class _WholeText:
    """All tokens attend to all: nothing is joined but cut to the T tokens of the text."""

    stop = False

    def __init__(self, tokens: int, on_keys: Callable[..., None] | None) -> None:
        self._tokens, self._on_keys = tokens, on_keys

    def require_given(self, decoder: Decoder, key_BKRH: torch.Tensor, value_BKRH: torch.Tensor) -> None:
        pass  # whatever attention is given

    def join(self, key_BkAH: torch.Tensor, value_BkAH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_BkTH, value_BkTH = (rows[:, :, : self._tokens] for rows in (key_BkAH, value_BkAH))
        if self._on_keys is not None:
            self._on_keys(key_BkTH, value_BkTH)
        return key_BkTH, value_BkTH
