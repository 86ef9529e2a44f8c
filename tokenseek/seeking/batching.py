"""Which examples are scored together, and in which shard they land: arithmetic on lengths, before any process starts.

An example's scores depend on its batch by the last bits of a float, so batches must be the same for any number of
processes, in any order of work, and after a restart. The plan is therefore made once for the whole data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tokenseek.errors import UserError


@dataclass(frozen=True, eq=False)
class ScoringPlan:
    """Shards of consecutive rows, each made of batches of similar lengths. See :func:`plan_batches`.

    Attributes:
        shards: for every shard its batches, for every batch the rows in it (int64), longest first.
        lengths: number of tokens of every row, int64.
    """

    shards: tuple[tuple[np.ndarray, ...], ...]
    lengths: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Of all examples."""
        return int(self.lengths.sum())

    @property
    def num_padded_tokens(self) -> int:
        """Tokens that the model sees, padding included."""
        return sum(len(batch) * int(self.lengths[batch[0]]) for shard in self.shards for batch in shard)

    def shard_tokens(self, shard: int) -> int:
        """Of all examples of a shard."""
        return sum(int(self.lengths[batch].sum()) for batch in self.shards[shard])


def plan_batches(lengths: Sequence[int] | np.ndarray, *, tokens_per_batch: int, tokens_per_shard: int) -> ScoringPlan:
    """Cut a data set into shards of consecutive rows, and each shard into batches of examples of similar lengths.

    Every row is in exactly one batch. Consecutive rows keep a merge sequential, and a shard still holds enough examples
    to find neighbours of like length. Its longest come first, so that memory that does not suffice shows at once.

    Args:
        lengths: tokens of every example, at least 1 each, in data order.
        tokens_per_batch: budget of a batch, padding counted; a longer example is a batch of its own.
        tokens_per_shard: about how many tokens a shard holds, padding not counted.

    Example:
        >>> plan_batches([3, 9, 4, 8], tokens_per_batch=18, tokens_per_shard=100).shards
        ((array([1, 3]), array([2, 0])),)
    """
    for name, value in (("tokens_per_batch", tokens_per_batch), ("tokens_per_shard", tokens_per_shard)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        raise UserError("There is nothing to score: the data set is empty. Check its path, filters and columns.")
    if (lengths < 1).any():
        raise UserError(f"Row {int(lengths.argmin())} has no tokens; leave empty examples out of the data set.")
    shard_of_row = (np.cumsum(lengths) - lengths) // tokens_per_shard
    starts = np.flatnonzero(np.diff(shard_of_row, prepend=-1))
    shards = (
        tuple(_batches(rows, lengths, tokens_per_batch)) for rows in np.split(np.arange(len(lengths)), starts[1:])
    )
    return ScoringPlan(tuple(shards), lengths)


def _batches(rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    while len(rows):
        size = max(1, tokens_per_batch // int(lengths[rows[0]]))
        yield rows[:size]
        rows = rows[size:]
