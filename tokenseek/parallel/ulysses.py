"""Ulysses: attention over a sequence that is spread over ranks, each of which takes some heads of all rows.

Shapes: B batch, T tokens, P ranks, R rows on one rank, N query heads, n = N/P, K key/value heads, k of them on a rank,
H head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from tokenseek.attention import attention_replaced
from tokenseek.errors import UserError
from tokenseek.modeling import Decoder
from tokenseek.parallel.all_to_all import heads_to_rows, rows_to_heads


class _OfSomeHeads:
    """An attention module as its attention function sees it, with the heads of one rank."""

    def __init__(self, module: nn.Module, query_heads_per_key: int, share: tuple[int, int, int]):
        self._module, self._share = module, share
        self.num_key_value_groups = query_heads_per_key

    def __getattr__(self, name: str):
        return _of_heads(getattr(self._module, name), *self._share)


def query_heads(decoder: Decoder) -> int:
    return decoder.causal_lm.config.get_text_config().num_attention_heads


def require_attention_interface(decoder: Decoder) -> None:
    """Raise UserError unless the model's layers look their attention function up by name."""
    modules = {type(module).__module__ for layer in decoder.layers for module in layer.modules()}
    if not any(hasattr(sys.modules[name], "ALL_ATTENTION_FUNCTIONS") for name in modules):
        raise UserError(_NO_INTERFACE.format(name=decoder.name))


_NO_INTERFACE = (
    "{name} computes attention in code of its own and not through Transformers' AttentionInterface, where sequence "
    "parallelism exchanges tokens for heads. Use a model that does, as Llama, Qwen, Mistral, Gemma, Phi-3, GPT-2, "
    "GPT-NeoX and OPT do (for GPT-2, reorder_and_upcast_attn must be off), or train without sequence parallelism."
)


@contextmanager
def heads_exchanged(
    decoder: Decoder,
    group: dist.ProcessGroup,
    interleaved: bool,
    replace: Callable[[Callable], Callable] | None = None,
) -> Iterator[None]:
    """Inside the block, attention takes local rows of queries and gives local rows back, and runs on all rows between.

    Keys and values are those of all rows for this rank's heads already; see
    :meth:`tokenseek.parallel.sharding.LocalPartition.exchange`.

    Args:
        replace: attention on all rows runs ``replace(original)`` (see
            :func:`tokenseek.attention.attention_replaced`) if not None.

    Raises:
        UserError: on leaving the block, if no attention function was called in it.
    """
    heads, ranks, rank = query_heads(decoder), group.size(), group.rank()
    share, called = (heads, ranks, rank), []

    def replace_local(original):
        on_all_rows = replace(original) if replace else original

        def attention(module: nn.Module, query_BNRH, key_BkTH, value_BkTH, attention_mask, *args, **kwargs):
            called.append(module)
            if query_BNRH.shape[1] != heads:
                raise UserError(
                    f"{decoder.name} has a layer of {query_BNRH.shape[1]} query heads where its config says {heads}; "
                    "sequence parallelism does not serve this model."
                )
            some_heads = _OfSomeHeads(module, heads // ranks // key_BkTH.shape[1], share)
            if attention_mask is not None and attention_mask.shape[1] == heads > 1:
                attention_mask = attention_mask.unflatten(1, (ranks, -1))[:, rank]
            kwargs = {name: _of_heads(value, *share) for name, value in kwargs.items()}
            # q: (B, N, R, H) -> all-to-all -> (B, N/P, P x R, H)
            (query_BnAH,) = rows_to_heads(group, interleaved, query_BNRH)
            output_BAnH, _ = on_all_rows(
                some_heads, query_BnAH, key_BkTH, value_BkTH, attention_mask, *args, **kwargs
            )
            # o: (B, P x R, N/P, H) -> all-to-all -> (B, R, N, H)
            return heads_to_rows(group, interleaved, output_BAnH), None

        return attention

    with attention_replaced(decoder.causal_lm, replace_local):
        try:
            yield
        except RuntimeError as error:
            if not called:  # keys and values of some heads met queries of all
                raise UserError(_NO_INTERFACE.format(name=decoder.name)) from error
            raise
    if not called:
        raise UserError(_NO_INTERFACE.format(name=decoder.name))


def _of_heads(value, heads: int, ranks: int, rank: int):
    """This rank's part of what holds one number per query head (attention sinks); anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) == heads:
        return value.unflatten(0, (ranks, -1))[rank]
    return value
