"""The token-position index: what it refuses, of what is written and of what was damaged."""

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
from index_shards import (
    FINGERPRINTS,
    HEADER,
    NUM_SHARDS,
    example,
    shard_rows,
    write_shards,
)

from tokenseek.errors import UserError
from tokenseek.index import IndexHeader, ShardStore, TokenIndex, merge_shards
from tokenseek.index.files import write_examples
from tokenseek.index.schema import SCHEMA

# Bad contents


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1 shard"):
        ShardStore(tmp_path, HEADER, 0)
    with pytest.raises(UserError, match="Shard 1 has no examples"):
        ShardStore(tmp_path, HEADER, NUM_SHARDS).write(1, [])
    assert ShardStore.open(tmp_path).finished() == set()


NAN_SCORES = np.array([1, np.nan, np.inf], np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": NAN_SCORES, "gradient": np.zeros(3)}, "2 of 3 context scores are not finite .first: nan at 1"),
        ({"context": np.zeros(3), "gradient": -NAN_SCORES[::-1]}, "gradient scores .*first: -inf at 0"),
        ({"context": np.zeros(1), "gradient": np.array([1e39])}, "gradient scores .*first: inf at 0"),
        ({"context": np.zeros(0), "gradient": np.zeros(0)}, "no tokens"),
        ({"context": np.zeros(2), "gradient": np.zeros(3)}, r"shape \(2,\) .* \(3,\)"),
        ({"context": np.zeros((2, 2)), "gradient": np.zeros((2, 2))}, r"both must be \[T\]"),
        ({"context": np.array([1, -0.5]), "gradient": np.zeros(2)}, "a context score is -0.5"),
        ({"row": -1}, "row is -1"),
    ],
)
def test_unusable_scores_are_refused_by_name(tmp_path, changes, message):
    bad = example(17, **changes)
    with pytest.raises(UserError, match=f"Shard 0: example '{bad.example_id}' .*{message}"):
        ShardStore(tmp_path, HEADER, NUM_SHARDS).write(0, [example(0), bad])
    assert ShardStore.open(tmp_path).finished() == set()


def test_index_of_nan_scores_made_elsewhere_is_refused(tmp_path):
    path = tmp_path / "index.arrow"
    bad = example(1, context=NAN_SCORES, gradient=np.zeros(3))
    write_examples(path, IndexHeader(FINGERPRINTS, num_examples=2, num_tokens=4), [example(0), bad])
    with pytest.raises(UserError, match=f"example '{bad.example_id}' .row 1. cannot be used: 2 of 3 context scores"):
        TokenIndex.open(path)


def test_row_in_two_shards_is_refused(shards, tmp_path):
    row = shard_rows(1)[0]
    ShardStore.open(shards).write(3, [*map(example, shard_rows(3)), example(row)])
    with pytest.raises(
        UserError, match=f"Row {row} .example '{example(row).example_id}'.*00001.arrow and .*00003.arrow"
    ):
        merge_shards(shards, tmp_path / "index.arrow")
    assert not (tmp_path / "index.arrow").exists()


def test_row_twice_in_a_shard_is_refused(shards, tmp_path):
    ShardStore.open(shards).write(3, [*map(example, shard_rows(3)), example(shard_rows(3)[1])])
    with pytest.raises(UserError, match=f"Row {shard_rows(3)[1]} .* is twice in .*shard-00003.arrow"):
        merge_shards(shards, tmp_path / "index.arrow")


@pytest.mark.parametrize("gap", [0, 11])
def test_missing_row_is_named(shards, tmp_path, gap):
    (shard,) = (s for s in range(NUM_SHARDS) if gap in shard_rows(s))
    ShardStore.open(shards).write(shard, [example(row) for row in shard_rows(shard) if row != gap])
    nearest = gap - 1 if gap else 1
    (holder,) = (s for s in range(NUM_SHARDS) if nearest in shard_rows(s))
    with pytest.raises(UserError, match=f"1 rows are in no shard: {gap} .* row, {nearest}, is in .*shard-0000{holder}"):
        merge_shards(shards, tmp_path / "index.arrow")


@pytest.mark.parametrize(("expected", "message"), [(25, "2 rows are in no shard: 23, 24"), (22, "holds row 22, but")])
def test_plan_with_a_count_tells_missing_and_superfluous_last_rows(tmp_path, expected, message):
    write_shards(tmp_path / "counted", header=IndexHeader(FINGERPRINTS, num_examples=expected))
    with pytest.raises(UserError, match=message):
        merge_shards(tmp_path / "counted", tmp_path / "index.arrow")


def test_plan_with_a_token_count_is_checked(tmp_path):
    write_shards(tmp_path / "counted", header=IndexHeader(FINGERPRINTS, num_tokens=7))
    with pytest.raises(UserError, match="tokens, their plan says 7"):
        merge_shards(tmp_path / "counted", tmp_path / "index.arrow")


def test_repeated_example_id_is_refused(tmp_path):
    write_shards(tmp_path / "shards", row_7={"example_id": example(2).example_id})
    with pytest.raises(UserError, match=f"id '{example(2).example_id}' stands for several rows: .*row [27].*row [27]"):
        merge_shards(tmp_path / "shards", tmp_path / "index.arrow")


def test_shard_of_another_run_is_refused(shards, tmp_path):
    write_shards(tmp_path / "other", header=IndexHeader(FINGERPRINTS | {"model": "m2"}, HEADER.scoring))
    os.replace(tmp_path / "other" / "shard-00002.arrow", shards / "shard-00002.arrow")
    with pytest.raises(UserError, match="(?s)shard-00002.arrow belongs to another.*model: the shard has 'm2'"):
        merge_shards(shards, tmp_path / "index.arrow")


def test_differing_fingerprints_are_named_field_by_field(index_path):
    index = TokenIndex.open(index_path)
    index.require(FINGERPRINTS)
    index.require({"model": "m1"})
    with pytest.raises(UserError) as caught:
        index.require(FINGERPRINTS | {"tokenizer": "t2", "max_length": 128, "revision": "r"})
    message = str(caught.value)
    assert "tokenizer: the index has 't1', this run has 't2'" in message
    assert "max_length: the index has 64, this run has 128" in message
    assert "revision: the index has nothing, this run has 'r'" in message
    assert "Score again" in message
    for same in ("model", "template", "data:", "labels"):
        assert same not in message


# Corruption


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_index_is_refused(index_path, share):
    content = index_path.read_bytes()
    index_path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="index.arrow is truncated or damaged.*merge its shards again"):
        TokenIndex.open(index_path)


def test_missing_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*nowhere.arrow\. Make it with `tokenseek score`"):
        TokenIndex.open(tmp_path / "nowhere.arrow")


def test_a_file_that_the_system_withholds_is_not_called_damaged(index_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pa, "memory_map", refuse)
    with pytest.raises(PermissionError):
        TokenIndex.open(index_path)


def test_other_arrow_files_are_refused(tmp_path, shards):
    pandas.DataFrame({"a": [1]}).to_feather(tmp_path / "frame.arrow", compression="uncompressed")
    with pytest.raises(UserError, match="no index of TokenSeek"):
        TokenIndex.open(tmp_path / "frame.arrow")
    with pytest.raises(UserError, match="not a whole index: it holds 5 examples, its header says None .*shard"):
        TokenIndex.open(shards / "shard-00000.arrow")


@pytest.mark.parametrize("column", ["row", "example_id", "gradient"])
def test_empty_cells_are_refused(index_path, tmp_path, column):
    table = pa.ipc.open_file(index_path).read_all()
    cells = pa.array([None, *table[column].to_pylist()[1:]], table.schema.field(column).type)
    table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), cells)
    with pa.ipc.new_file(tmp_path / "null.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="damaged: it has empty cells"):
        TokenIndex.open(tmp_path / "null.arrow")


def test_index_of_no_examples_is_refused(tmp_path):
    write_examples(tmp_path / "empty.arrow", IndexHeader(FINGERPRINTS, num_examples=0, num_tokens=0), [])
    with pytest.raises(UserError, match="not a whole index: it holds 0 examples"):
        TokenIndex.open(tmp_path / "empty.arrow")


def test_index_of_another_schema_version_says_so(tmp_path):
    header = IndexHeader(FINGERPRINTS, num_examples=1, num_tokens=1, schema_version=2)
    write_examples(tmp_path / "new.arrow", header, [example(0)])
    with pytest.raises(UserError, match="schema version 2; this TokenSeek reads version 1"):
        TokenIndex.open(tmp_path / "new.arrow")


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (IndexHeader(FINGERPRINTS, num_examples=3, num_tokens=1), [0, 1], "holds 2 examples, its header says 3"),
        (IndexHeader(FINGERPRINTS, num_examples=2, num_tokens=1), [0, 1], "tokens, its header says 1"),
        (
            IndexHeader(FINGERPRINTS, num_examples=2, num_tokens=example(0).num_tokens + example(2).num_tokens),
            [0, 2],
            "has row 2 where row 1 should be",
        ),
    ],
)
def test_index_that_contradicts_its_header_is_refused(tmp_path, header, rows, message):
    write_examples(tmp_path / "odd.arrow", header, map(example, rows))
    with pytest.raises(UserError, match=message):
        TokenIndex.open(tmp_path / "odd.arrow")


def column_bytes(path: Path, column: str) -> int:
    """Where in a file the middle of a column's data is."""
    with pa.memory_map(str(path)) as file:
        start = file.read_buffer(1).address
        chunk = pa.ipc.open_file(file).read_all()[column].chunk(0)
        values = chunk.values if pa.types.is_large_list(chunk.type) else chunk
        data = values.buffers()[-1]
        return data.address - start + data.size // 2


@pytest.mark.parametrize("column", SCHEMA.names)
def test_flipped_bit_in_any_column_is_refused_by_example(index_path, column):
    offset = column_bytes(index_path, column)
    content = bytearray(index_path.read_bytes())
    content[offset] ^= 1
    index_path.write_bytes(content)
    with pytest.raises(UserError, match=r"index.arrow is .*damaged: example '.*' \(row \d+\).*merge its shards again"):
        TokenIndex.open(index_path)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_flipped_bit_in_a_shard_is_refused_by_shard_and_example(shards, tmp_path, column):
    path = shards / "shard-00003.arrow"
    offset = column_bytes(path, column)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"shard-00003.arrow is .*: example '.*' \(row \d+\).*only this shard is scored"
    ):
        merge_shards(shards, tmp_path / "index.arrow")
    assert not (tmp_path / "index.arrow").exists()


def test_a_flip_of_any_byte_is_refused_or_harmless(index_path, tmp_path):
    """Arrow's own metadata, offsets and padding too: never other scores, never another kind of error, never a crash."""

    def contents(index: TokenIndex) -> list:
        rows = range(len(index))
        return [
            index.header,
            [(index.example_id(row), index.num_tokens(row), index.tokens_crc(row)) for row in rows],
            [scores.tobytes() for row in rows for scores in index.scores(row)],
        ]

    expected = contents(TokenIndex.open(index_path))
    original, broken = index_path.read_bytes(), tmp_path / "broken.arrow"
    rng = random.Random(0)
    refused = 0
    for offset in range(0, len(original), 3):
        content = bytearray(original)
        content[offset] ^= 1 << rng.randrange(8)
        broken.unlink(missing_ok=True)
        broken.write_bytes(content)
        try:
            index = TokenIndex.open(broken)
        except UserError:
            refused += 1
        else:
            assert contents(index) == expected, f"offset {offset}"
    assert refused > len(original) / 6


def test_header_survives_json():
    header = IndexHeader(FINGERPRINTS, {"a": 1.5, "b": None}, 3, 4)
    assert IndexHeader.from_json(header.to_json()) == header
    for text in ("nonsense", "3", "{}", json.dumps({"schema_version": 1, "surprise": 2})):
        with pytest.raises(UserError, match="ndex"):
            IndexHeader.from_json(text)
