"""From shards to one index, in data order."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenseek.errors import UserError
from tokenseek.index.files import ExampleFile, write_examples
from tokenseek.index.schema import IndexHeader, differences
from tokenseek.index.shards import ShardStore


def merge_shards(directory: str | Path, output: str | Path) -> IndexHeader:
    """Merge the finished shards of a folder into one index file, sorted by row.

    The bytes written depend only on the scores: not on the number of processes, on the plan's division into shards, or
    on the order in which they finished. Scores are streamed from the memory-mapped shards; ids and lengths of all
    examples are held in memory.

    Args:
        directory: folder of a `ShardStore`, all of whose shards are finished.
        output: file to write, e.g. "index.arrow"; replaced in one step if it exists.

    Returns:
        The header written, with the counts filled in.

    Raises:
        UserError: a shard is missing, damaged or of another run; a row is missing or present twice. The message names
            the shard, the example and the fix.
    """
    store, output = ShardStore.open(directory), Path(output)
    if missing := sorted(set(range(store.num_shards)) - store.finished()):
        raise UserError(
            f"{len(missing)} of {store.num_shards} shards in {directory} are not finished: {_abbreviated(missing)}. "
            "Run scoring again with the same settings: finished shards are kept."
        )
    shards = [_open_shard(store, shard) for shard in range(store.num_shards)]

    # Which shard, and which of its positions, holds the k-th row of the index.
    rows = np.concatenate([shard.rows for shard in shards])
    shard_of = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
    position_of = np.concatenate([np.arange(len(shard)) for shard in shards])
    order = np.argsort(rows, kind="stable")
    rows, shard_of, position_of = rows[order], shard_of[order], position_of[order]
    _check_rows(rows, shard_of, shards, store)
    _check_ids(shards)

    num_tokens = sum(int(shard.num_tokens.sum(dtype=np.int64)) for shard in shards)
    if store.header.num_tokens not in (None, num_tokens):
        raise UserError(
            f"The shards in {directory} hold {num_tokens} tokens, their plan says {store.header.num_tokens}. "
            "Delete the folder and score again."
        )
    header = replace(store.header, num_examples=len(rows), num_tokens=num_tokens)
    output.parent.mkdir(parents=True, exist_ok=True)
    examples = (
        shards[shard].example(position) for shard, position in zip(shard_of.tolist(), position_of.tolist(), strict=True)
    )
    write_examples(output, header, examples)
    return header


def _open_shard(store: ShardStore, shard: int) -> ExampleFile:
    path = store.path(shard)
    file = ExampleFile(path, fix=f"Delete {path} and run scoring again: only this shard is scored again.")
    if differing := differences(file.header.flat(), store.header.flat(), "the shard", "the plan"):
        raise UserError(f"{path} belongs to another scoring run:\n  " + "\n  ".join(differing) + f"\n{file.fix}")
    file.verify()
    return file


def _check_rows(rows: np.ndarray, shard_of: np.ndarray, shards: list[ExampleFile], store: ShardStore) -> None:
    """`rows`, sorted, must be 0, 1, 2, ... up to the number of examples of the plan."""
    twice = np.flatnonzero(rows[1:] == rows[:-1])
    if twice.size:
        k = twice[0]
        first, second = shards[shard_of[k]], shards[shard_of[k + 1]]
        example_id = first.example(int(np.flatnonzero(first.rows == rows[k])[0])).example_id
        where = f"twice in {first.path}" if first is second else f"in {first.path} and in {second.path}"
        raise UserError(
            f"Row {rows[k]} (example {example_id!r}) is {where}. Delete the shards named and run scoring again; if "
            f"they come back the same, delete {store.directory}."
        )
    num_examples = len(rows) if store.header.num_examples is None else store.header.num_examples
    gaps = np.setdiff1d(np.arange(num_examples), rows, assume_unique=True)
    if gaps.size:
        nearest = max(int(np.searchsorted(rows, gaps[0])) - 1, 0)
        raise UserError(
            f"{gaps.size} rows are in no shard: {_abbreviated(gaps.tolist())} (the nearest row, {rows[nearest]}, "
            f"is in {shards[shard_of[nearest]].path}). Delete {store.directory} and score again."
        )
    if len(rows) > num_examples:
        raise UserError(
            f"{shards[shard_of[-1]].path} holds row {rows[-1]}, but the plan has {num_examples} examples. "
            f"Delete {store.directory} and score again."
        )


def _check_ids(shards: list[ExampleFile]) -> None:
    example_ids = pa.chunked_array([chunk for shard in shards for chunk in shard.example_ids.chunks])
    if pc.count_distinct(example_ids).as_py() == len(example_ids):
        return
    repeated = next(item["values"] for item in pc.value_counts(example_ids).to_pylist() if item["counts"] > 1)
    holders = [
        f"{shard.path} (row {row})"
        for shard in shards
        for row, example_id in zip(shard.rows, shard.example_ids.to_pylist(), strict=True)
        if example_id == repeated
    ]
    raise UserError(
        f"Example id {repeated!r} stands for several rows: {', '.join(holders)}. Ids must be unique; prepare the data "
        "again and score into a new folder."
    )


def _abbreviated(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
