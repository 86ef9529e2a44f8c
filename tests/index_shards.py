"""Shards of made-up scores, and the index that they are merged into."""

import random
from pathlib import Path

import numpy as np

from tokenseek.index import IndexHeader, ScoredExample, ShardStore, tokens_crc

FINGERPRINTS = {
    "model": "m1",
    "tokenizer": "t1",
    "template": "p1",
    "data": "d1",
    "max_length": 64,
    "labels": "response",
}
HEADER = IndexHeader(FINGERPRINTS, {"gradient": "abs", "layers": (1, 2)})
NUM_EXAMPLES, NUM_SHARDS = 23, 5


def example(seed: int, **changes) -> ScoredExample:
    rng = np.random.default_rng(seed)
    num_tokens = int(rng.integers(1, 40))
    content = {
        "example_id": f"{seed:08d}-{seed * 7919:016x}",
        "row": seed,
        "tokens_crc": tokens_crc(rng.integers(0, 1000, num_tokens)),
        "context": rng.random(num_tokens, np.float32),
        "gradient": rng.standard_normal(num_tokens, np.float32),
    }
    return ScoredExample(**content | changes)


def shard_rows(shard: int, num_shards: int = NUM_SHARDS) -> list[int]:
    """Rows of a shard: scattered over the data set, as bucketing by length does."""
    rows = list(range(NUM_EXAMPLES))
    random.Random(0).shuffle(rows)
    return rows[shard::num_shards]


def write_shards(folder: Path, shards=None, num_shards=NUM_SHARDS, header=HEADER, **changed_by_row) -> None:
    """Write shards; `row_7={...}` changes fields of the example of row 7."""
    store = ShardStore(folder, header, num_shards)
    for shard in range(num_shards) if shards is None else shards:
        store.write(shard, [example(r, **changed_by_row.get(f"row_{r}", {})) for r in shard_rows(shard, num_shards)])


def work(folder: Path, run_id: str, seed: int) -> None:
    """One scoring process: takes whatever shards nobody else has taken, in its own order."""
    store = ShardStore(folder, HEADER, NUM_SHARDS)
    shards = list(range(NUM_SHARDS))
    random.Random(seed).shuffle(shards)
    for shard in shards:
        if store.claim(shard, run_id):
            store.write(shard, [example(row) for row in shard_rows(shard)])
