"""Scoring a data set on any number of processes that never wait for one another.

Processes share nothing but the shard folder: each takes the next shard that no other has taken, scores and writes it. A
slow process takes fewer, the shard of one that dies is taken over by another, and none sits behind a collective with a
timeout. Sequence-parallel ranks, which score a text together, are one process in this: their first takes and writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from tokenseek.errors import UserError
from tokenseek.index import ScoredExample, ShardStore, tokens_crc
from tokenseek.labels import IGNORED
from tokenseek.seeking.batching import ScoringPlan
from tokenseek.seeking.scorer import Prepared, Scores, TokenScorer

if TYPE_CHECKING:  # scoring itself needs no data sets library
    from datasets import Dataset

Decision = TypeVar("Decision")

_POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


def assigned_shards(plan: ScoringPlan, part: int = 0, num_parts: int = 1) -> range:
    """The shards of one of several jobs that know nothing of each other (a Slurm array, say): every `num_parts`-th."""
    if not 0 <= part < num_parts:
        raise UserError(f"This is part {part} of {num_parts}; parts are numbered from 0 to {num_parts - 1}.")
    return range(part, len(plan.shards), num_parts)


class Team:
    """The processes that score a shard together: one alone, or the sequence-parallel ranks of a group.

    The first decides for all, since a folder may look different to each of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.is_first = group is None or group.rank() == 0

    def agreed(self, decide: Callable[[], Decision]) -> Decision:
        """``decide()`` of the first, in all; the others wait for it, which must not take long."""
        if self.group is None:
            return decide()
        decision: list[Any] = [decide() if self.is_first else None]
        dist.broadcast_object_list(decision, group=self.group, group_src=0)
        agreed: Decision = decision[0]
        return agreed


class SeekingProgress:
    """Progress bar in tokens per second and time left, over the work of all processes that share the folder.

    Args:
        shards: those that this job is to finish (:func:`assigned_shards`).
        disable: True on all processes but the main one.
    """

    def __init__(self, store: ShardStore, plan: ScoringPlan, shards: Iterable[int], *, disable: bool = False) -> None:
        self._store, self._tokens = store, {shard: plan.shard_tokens(shard) for shard in shards}
        self._current, self._polled = 0, -_POLL_SECONDS
        self._finished = 0 if disable else self._count()
        self._bar = tqdm(
            total=sum(self._tokens.values()), initial=self._finished, desc="seeking tokens", unit="tok",
            unit_scale=True, smoothing=0.05, disable=disable,
        )  # fmt: skip

    def advance(self, tokens: int) -> None:
        """This process has scored `tokens` more of its current shard."""
        self._current += tokens
        self._show()

    def shard_done(self) -> None:
        """A shard is written: what was under way counts as done."""
        self._current = 0
        self._show(poll=True)

    def poll(self) -> None:
        """Show what the other processes have done by now."""
        self._show(poll=True)

    def _show(self, poll: bool = False) -> None:
        if self._bar.disable:
            return
        if poll or time.monotonic() - self._polled > _POLL_SECONDS:
            self._finished, self._polled = self._count(), time.monotonic()
        self._bar.update(self._finished + self._current - self._bar.n)

    def _count(self) -> int:
        return sum(self._tokens.get(shard, 0) for shard in self._store.finished())

    def __enter__(self) -> SeekingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def seek(
    scorer: TokenScorer,
    dataset: Dataset,
    store: ShardStore,
    plan: ScoringPlan,
    *,
    run_id: str,
    shards: Iterable[int] | None = None,
    progress: SeekingProgress | None = None,
    team: Team | None = None,
) -> int:
    """Score the shards that are not finished and that no other process of this run has taken, until none is left.

    Args:
        dataset: columns `example_id`, `input_ids` and `labels`, the rows that `plan` was made for.
        store: made for `len(plan.shards)` shards.
        run_id: the same in all processes of this launch and in no other (:meth:`ShardStore.claim`).
        shards: all by default; :func:`assigned_shards` for one job of several.
        team: the ranks that `scorer` shares its batches with; all of them call this.

    Returns:
        How many shards this process (or its team) scored.

    Raises:
        UserError: a score is not finite; the message names the example.
    """
    if len(dataset) != len(plan.lengths) or store.num_shards != len(plan.shards):
        raise UserError(
            f"The plan has {len(plan.lengths)} examples in {len(plan.shards)} shards, the data set {len(dataset)} "
            f"examples and the folder {store.num_shards} shards; make all three from the same data."
        )
    scored, team = 0, team or Team()
    for shard in range(len(plan.shards)) if shards is None else shards:
        if team.agreed(partial(store.claim, shard, run_id)):
            _score_shard(scorer, dataset, store, plan, shard, progress, team)
            scored += 1
    return scored


def seek_abandoned(
    scorer: TokenScorer,
    dataset: Dataset,
    store: ShardStore,
    plan: ScoringPlan,
    *,
    run_id: str,
    shards: Iterable[int] | None = None,
    progress: SeekingProgress | None = None,
    team: Team | None = None,
    lease_seconds: float | None = None,
    poll_seconds: float = _POLL_SECONDS,
) -> int:
    """After :func:`seek`: wait until all shards are finished, and score those of processes that died or hang.

    Args:
        lease_seconds: how long a process may give no sign (:meth:`ShardStore.take_over`).

    Returns:
        How many shards this process took over.
    """
    everything = set(range(len(plan.shards)) if shards is None else shards)
    taken, team = 0, team or Team()

    def find() -> tuple[bool, int | None]:
        """Whether shards are left, and one that was taken over."""
        left = everything - store.finished()
        if progress:
            progress.poll()
        for shard in sorted(left):
            if holder := store.take_over(shard, run_id, lease_seconds):
                _log.warning("Shard %d is scored again: %s, which had it, no longer responds.", shard, holder)
                return True, shard
        return bool(left), None

    while True:
        are_left, shard = team.agreed(find)
        if shard is not None:
            _score_shard(scorer, dataset, store, plan, shard, progress, team)
            taken += 1
        elif are_left:
            time.sleep(poll_seconds)
        else:
            return taken


def _score_shard(
    scorer: TokenScorer,
    dataset: Dataset,
    store: ShardStore,
    plan: ScoringPlan,
    shard: int,
    progress: SeekingProgress | None,
    team: Team,
) -> None:
    examples: list[ScoredExample] = []
    for rows, scored in _score_batches(scorer, dataset, plan.shards[shard]):
        examples += scored
        store.renew(shard)  # of no effect but on the one that has claimed it
        if progress:
            progress.advance(int(plan.lengths[rows].sum()))
    if team.is_first and not store.is_finished(shard):  # another may have believed this one to be dead
        store.write(shard, examples)
    if progress:
        progress.shard_done()


def wait_for_shards(
    store: ShardStore,
    shards: Iterable[int] | None = None,
    *,
    progress: SeekingProgress | None = None,
    stall_seconds: float = 3600.0,
    poll_seconds: float = _POLL_SECONDS,
) -> None:
    """Return once all shards are on the disk; other processes may still be at work on theirs. No collective is used.

    Raises:
        UserError: no shard was finished for `stall_seconds`, so that the processes at work have probably died.
    """
    missing = set(range(store.num_shards) if shards is None else shards)
    changed = time.monotonic()
    while True:
        left = missing - store.finished()
        if progress:
            progress.poll()
        if not left:
            return
        if left != missing:
            missing, changed = left, time.monotonic()
        elif time.monotonic() - changed > stall_seconds:
            some = ", ".join(map(str, sorted(missing)[:10])) + (", ..." if len(missing) > 10 else "")
            raise UserError(
                f"No shard in {store.directory} was finished for {stall_seconds / 60:.0f} minutes; {len(missing)} are "
                f"missing: {some}. Look for the error of the process that had them, and run scoring again: finished "
                "shards are kept."
            )
        time.sleep(poll_seconds)


def _score_batches(
    scorer: TokenScorer, dataset: Dataset, batches: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, Iterator[ScoredExample]]]:
    """The rows of each batch, and its examples; the next one is prepared while the device is at work."""
    following = _prepare(scorer, dataset, batches[0])
    for rows, after in zip_longest(batches, batches[1:]):
        batch, scores = following, scorer.run(following.prepared)
        if after is not None:
            following = _prepare(scorer, dataset, after)
        yield rows, _scored(scorer, batch, scores, rows)


class _Batch(NamedTuple):
    example_ids: list[str]
    input_ids: list[torch.Tensor]
    prepared: Prepared


def _prepare(scorer: TokenScorer, dataset: Dataset, rows: np.ndarray) -> _Batch:
    batch = dataset[rows.tolist()]
    input_ids = [torch.as_tensor(ids, dtype=torch.int64) for ids in batch["input_ids"]]
    labels = [torch.as_tensor(labels, dtype=torch.int64) for labels in batch["labels"]]
    prepared = scorer.prepare(
        pad_sequence(input_ids, batch_first=True),
        pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )
    return _Batch(batch["example_id"], input_ids, prepared)


def _scored(scorer: TokenScorer, batch: _Batch, scores: Scores, rows: np.ndarray) -> Iterator[ScoredExample]:
    context, gradient = torch.stack(scores).cpu().numpy()  # for which the host waits, once a batch
    for i, (row, ids) in enumerate(zip(rows.tolist(), batch.input_ids, strict=True)):
        example = ScoredExample(
            example_id=batch.example_ids[i],
            row=row,
            tokens_crc=tokens_crc(ids),
            context=context[i, : len(ids)].copy(),  # a copy, for a view would keep the padded batch alive
            gradient=gradient[i, : len(ids)].copy(),
        )
        if fault := example.fault():
            raise UserError(
                f"Example {example.example_id!r} (row {row}) cannot be scored: {fault}. " + _cause(scorer.dtype)
            )
        yield example


def _cause(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "Most likely float16 overflowed: load the model in bfloat16 or float32."
    return (
        f"The model computes in {str(dtype).removeprefix('torch.')}, whose range suffices, so its weights are most "
        "likely damaged: check them for values that are not finite, or load them again."
    )
