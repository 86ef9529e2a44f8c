"""Ulysses: attention over a sequence that is spread over ranks, each of which takes some heads of all rows.

Shapes: B batch, T tokens, P ranks, R rows on one rank, N query heads, n = N/P, K key/value heads, k of them on a rank,
H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from tokenseek.decoder.attention import Attention, Replace, attention_replaced, has_attention_interface
from tokenseek.decoder.find import Decoder
from tokenseek.errors import UserError
from tokenseek.ulysses.all_to_all import heads_to_rows, rows_to_heads
from tokenseek.ulysses.layout import shard_heads


class _OfSomeHeads:
    """An attention module as its attention function sees it, with the heads of one rank."""

    def __init__(self, module: nn.Module, query_heads_per_key: int, share: tuple[int, int, int]) -> None:
        self._module, self._share = module, share
        self.num_key_value_groups = query_heads_per_key

    def __getattr__(self, name: str) -> Any:
        return _of_heads(getattr(self._module, name), *self._share)

    def __eq__(self, other: object) -> bool:  # equal to the module itself, for code that looks for it
        return other is self._module

    def __hash__(self) -> int:
        return hash(self._module)


def query_heads(decoder: Decoder) -> int:
    """Of each attention layer, as the model's configuration says."""
    return decoder.causal_lm.config.get_text_config().num_attention_heads


def require_shareable(decoder: Decoder, group: dist.ProcessGroup) -> None:
    """Raise UserError unless the ranks of `group` can share the decoder's attention."""
    if not has_attention_interface(decoder):
        raise UserError(_NO_INTERFACE.format(name=decoder.name))
    if decoder.mixers or decoder.sharing:
        what = "carries a state from token to token" if decoder.mixers else "shares keys and values"
        raise UserError(
            f"{decoder.name} {what} in {len(decoder.mixers) or len(decoder.sharing)} of its layers, which ranks that "
            "share texts do not support. Train without sequence parallelism (sp_size)."
        )
    shard_heads(query_heads(decoder), query_heads(decoder), group.size())


_NO_INTERFACE = (
    "{name} computes attention in code of its own and not through Transformers' AttentionInterface, where sequence "
    "parallelism exchanges tokens for heads. Use a model that does, as Llama, Qwen, Mistral, Gemma, Phi-3, GPT-2, "
    "GPT-NeoX and OPT do (for GPT-2, reorder_and_upcast_attn must be off), or train without sequence parallelism."
)


class Joining(Protocol):
    """How keys and values of the rows that run become those that they attend to.

    Attributes:
        stop: nothing but keys and values is asked for: :meth:`join` raises.
    """

    stop: bool

    def require_given(self, decoder: Decoder, key_BKRH: torch.Tensor, value_BKRH: torch.Tensor) -> None:
        """Raise UserError unless these, of this process's rows, can be joined."""

    def join(self, key_BkAH: torch.Tensor, value_BkAH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From those of all ranks' rows, this rank's heads."""


class SharedAttention:
    """An attention function's part on one rank, between the exchange of rows for heads and the one back.

    Queries, keys and values are sent in one collective.

    Args:
        original: the attention function, for all rows.
        joining: None where keys and values are those that are attended to already, of this rank's heads.
    """

    def __init__(
        self,
        decoder: Decoder,
        group: dist.ProcessGroup,
        interleaved: bool,
        original: Attention,
        joining: Joining | None,
    ) -> None:
        self.decoder, self.heads = decoder, query_heads(decoder)
        self.group, self.interleaved, self.original, self.joining = group, interleaved, original, joining

    def __call__(
        self,
        module: nn.Module,
        query_BNRH: torch.Tensor,
        key_BKRH: torch.Tensor,
        value_BKRH: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of local rows, all heads, to the keys and values of all ranks' rows."""
        heads, ranks, rank = self.heads, self.group.size(), self.group.rank()
        if query_BNRH.shape[1] != heads:
            raise UserError(
                f"{self.decoder.name} has a layer of {query_BNRH.shape[1]} query heads where its config says {heads}; "
                "sequence parallelism does not support this model."
            )
        share = heads, ranks, rank
        key_BkTH, value_BkTH, *queries = self._exchanged(query_BNRH, key_BKRH, value_BKRH)
        some_heads = _OfSomeHeads(module, heads // ranks // key_BkTH.shape[1], share)
        if attention_mask is not None and attention_mask.shape[1] == heads > 1:
            attention_mask = attention_mask.unflatten(1, (ranks, -1))[:, rank]
        kwargs = {name: _of_heads(value, *share) for name, value in kwargs.items()}
        output_BAnH, _ = self.original(some_heads, *queries, key_BkTH, value_BkTH, attention_mask, *args, **kwargs)
        # o: (B, P x R, N/P, H) -> all-to-all -> (B, R, N, H)
        return heads_to_rows(self.group, self.interleaved, output_BAnH), None

    def _exchanged(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values that are attended to, and queries (B, N/P, P x R, H), if they are asked for."""
        # q, k, v: (B, N, R, H) -> all-to-all -> (B, N/P, P x R, H)
        if self.joining is None:
            return key, value, *rows_to_heads(self.group, self.interleaved, query)
        self.joining.require_given(self.decoder, key, value)
        sent = _heads_for_ranks(self.heads, self.group.size(), key, value)
        if not self.joining.stop:
            sent = (*sent, query)
        key_BkAH, value_BkAH, *queries = rows_to_heads(self.group, self.interleaved, *sent)
        return *self.joining.join(key_BkAH, value_BkAH), *queries


def keys_to_heads(
    query_heads: int, group: dist.ProcessGroup, interleaved: bool, *rows_BKRH: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Keys or values of local rows, all heads -> those of all rows, [B, k, P * R, H], this rank's heads."""
    sent = _heads_for_ranks(query_heads, group.size(), *rows_BKRH)
    return rows_to_heads(group, interleaved, *sent)


def _heads_for_ranks(query_heads: int, ranks: int, *rows_BKRH: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, k x P, R, H): the heads of keys or values, those for each rank after each other; some repeated if need be."""
    key_heads = rows_BKRH[0].shape[1]
    heads = shard_heads(query_heads, key_heads, ranks)
    if heads.is_split(key_heads):
        return rows_BKRH
    # Each as often as another, and one after the other.
    return tuple(rows.repeat_interleave(len(heads.key_heads) // key_heads, dim=1) for rows in rows_BKRH)


@contextmanager
def heads_exchanged(
    decoder: Decoder,
    group: dist.ProcessGroup,
    interleaved: bool,
    replace: Replace | None,
    joining: Joining | None,
) -> Iterator[None]:
    """Inside the block, attention takes local rows and gives local rows back, and runs on all rows between.

    Args:
        replace: attention on all rows runs ``replace(original)`` (see
            :func:`tokenseek.decoder.attention.attention_replaced`) if not None.
        joining: see :class:`SharedAttention`.

    Raises:
        UserError: on leaving the block, if no attention function was called in it.
    """
    called: list[nn.Module] = []

    def replace_local(original: Attention) -> Attention:
        own = replace(original) if replace else original
        on_all_rows = SharedAttention(decoder, group, interleaved, own, joining)

        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            called.append(module)
            return on_all_rows(module, *args, **kwargs)

        return attention

    with attention_replaced(decoder.causal_lm, replace_local):
        yield
    if not called:
        raise UserError(_NO_INTERFACE.format(name=decoder.name))


def _of_heads(value: Any, heads: int, ranks: int, rank: int) -> Any:
    """This rank's part of what holds one number per query head (attention sinks); anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) == heads:
        return value.unflatten(0, (ranks, -1))[rank]
    return value
