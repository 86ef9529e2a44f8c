"""Which rank holds which tokens and which heads: arithmetic alone, no process needed.

Shapes: B batch, T tokens, A rows (tokens) of one pass, P ranks, R rows of one pass on one rank, N query heads, K
key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from tokenseek.errors import UserError


@dataclass(frozen=True)
class Shards:
    """The rows of one pass, dealt to ranks; every rank has the same number of slots, -1 where a slot is empty.

    Attributes:
        positions_BPR: int64, position in the text of every slot of every rank.
        interleaved: neighbouring rows are on neighbouring ranks, so that sorting all rows into the order of the text is
            a transposition; else a rank's rows follow each other in the text.
    """

    positions_BPR: torch.Tensor
    interleaved: bool

    @cached_property
    def in_text_order(self) -> torch.Tensor:
        """[B, P * R]: the rows of all ranks ascending, in the order in which the all-to-all leaves them."""
        return (self.positions_BPR.transpose(1, 2) if self.interleaved else self.positions_BPR).flatten(1)


def deal(positions_BA: torch.Tensor, ranks: int) -> Shards:
    """The balanced layout: rank p holds the rows p, p + P, p + 2P, ... of each example.

    Ranks differ by at most one row, wherever in the text the rows cluster.

    Args:
        positions_BA: int64, ascending, -1 at the end of examples with fewer rows.

    Example:
        >>> deal(torch.tensor([[2, 3, 4, 5, 9]]), ranks=2).positions_BPR
        tensor([[[ 2,  4,  9],
                 [ 3,  5, -1]]])
    """
    missing = -positions_BA.shape[1] % ranks
    padded = torch.nn.functional.pad(positions_BA, (0, missing), value=-1)
    return Shards(padded.unflatten(1, (-1, ranks)).transpose(1, 2), interleaved=True)


def cut(positions_BA: torch.Tensor, ranks: int, tokens: int) -> Shards:
    """The contiguous layout of stock Ulysses: rank p holds the rows within the p-th of P equal stretches of the text.

    Slots are as many as the fullest rank needs, so that its load is everybody's.

    Args:
        positions_BA: int64, ascending, -1 at the end of examples with fewer rows.
        tokens: T.

    Example:
        >>> cut(torch.tensor([[2, 3, 4, 5, 9]]), ranks=2, tokens=10).positions_BPR
        tensor([[[ 2,  3,  4],
                 [ 5,  9, -1]]])
    """
    batch, rows = positions_BA.shape
    owner_BA = owner_of(positions_BA, ranks, tokens)
    count_BP = torch.nn.functional.one_hot(owner_BA, ranks + 1).sum(1)[:, :ranks]
    start_BP = count_BP.cumsum(1) - count_BP
    slots = max(1, int(count_BP.max()))
    within_BA = torch.arange(rows, device=positions_BA.device) - start_BP.gather(1, owner_BA.clamp(max=ranks - 1))
    target_BA = torch.where(positions_BA >= 0, owner_BA * slots + within_BA, ranks * slots)
    positions = positions_BA.new_full((batch, ranks * slots + 1), -1).scatter_(1, target_BA, positions_BA)
    return Shards(positions[:, :-1].unflatten(1, (ranks, slots)), interleaved=False)


def owner_of(positions: torch.Tensor, ranks: int, tokens: int) -> torch.Tensor:
    """The rank that holds each position in the contiguous layout; `ranks` for -1."""
    return torch.where(positions >= 0, positions // -(-tokens // ranks), ranks)


# Deals the rows of a pass: positions [B, A] (int64, ascending, -1 at the end of examples with fewer rows), P and T.
Dealer: TypeAlias = Callable[[torch.Tensor, int, int], Shards]


@dataclass(frozen=True)
class Layout:
    """Which rank holds which rows of a pass.

    Attributes:
        in_layers: deals them for the time that a layer runs.
        between_layers: deals them for the time between two layers; None where they stay where they are.
    """

    in_layers: Dealer
    between_layers: Dealer | None = None


# By the name that `training.sequence_layout` and :func:`tokenseek.parallel.enable_sequence_parallelism` give them.
LAYOUTS = {
    "balanced": Layout(lambda positions_BA, ranks, tokens: deal(positions_BA, ranks)),
    "contiguous": Layout(cut),
    "regroup": Layout(lambda positions_BA, ranks, tokens: deal(positions_BA, ranks), between_layers=cut),
}


@dataclass(frozen=True)
class HeadShards:
    """Which heads a rank attends with. See :func:`shard_heads`.

    Attributes:
        query_heads: number of query heads per rank, N / P; rank p has the p-th stretch of them.
        key_heads: the key/value heads sent to each rank, rank after rank: one for every `query_heads_per_key` heads.
        query_heads_per_key: how many neighbouring query heads share a key/value head on a rank.
    """

    query_heads: int
    key_heads: tuple[int, ...]
    query_heads_per_key: int

    def is_split(self, heads: int) -> bool:
        """No key/value head goes to two ranks."""
        return self.key_heads == tuple(range(heads))


def shard_heads(query_heads: int, key_heads: int, ranks: int) -> HeadShards:
    """Deal heads to ranks. Where ranks exceed key/value heads, or split a group of query heads, these are replicated.

    Raises:
        UserError: `ranks` does not divide `query_heads`.

    Example:
        >>> shard_heads(query_heads=8, key_heads=2, ranks=4)
        HeadShards(query_heads=2, key_heads=(0, 0, 1, 1), query_heads_per_key=2)
    """
    if query_heads % ranks:
        accepted = [str(d) for d in range(1, query_heads + 1) if query_heads % d == 0]
        raise UserError(
            f"{ranks} sequence-parallel ranks cannot share {query_heads} query heads evenly. Sizes that can: "
            f"{', '.join(accepted)}."
        )
    group, per_rank = query_heads // key_heads, query_heads // ranks
    # The longest runs of query heads that neither a rank's nor a key/value head's border cuts.
    run = math.gcd(group, per_rank)
    return HeadShards(per_rank, tuple(head // group for head in range(0, query_heads, run)), run)
