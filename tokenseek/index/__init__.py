"""The token-position index: two importance scores for every token of a data set, in one memory-mapped Arrow file.

Scoring writes shards (`ShardStore`), `merge_shards` turns them into one file, and training reads it (`TokenIndex`).
"""

from tokenseek.index.checksums import tokens_crc
from tokenseek.index.merge import merge_shards
from tokenseek.index.reader import TokenIndex
from tokenseek.index.schema import SCHEMA_VERSION, IndexHeader, ScoredExample
from tokenseek.index.shards import ShardStore

__all__ = [
    "SCHEMA_VERSION",
    "IndexHeader",
    "ScoredExample",
    "ShardStore",
    "TokenIndex",
    "merge_shards",
    "tokens_crc",
]
