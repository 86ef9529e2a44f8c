"""The token-position index: shards, merge and reader, under crashes, corruption and any number of processes."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest

from tokenseek.errors import UserError
from tokenseek.index import IndexHeader, ScoredExample, ShardStore, TokenIndex, merge_shards, schema, tokens_crc
from tokenseek.index.files import write_examples
from tokenseek.index.schema import SCHEMA

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


@pytest.fixture
def shards(tmp_path) -> Path:
    write_shards(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def index_path(shards, tmp_path) -> Path:
    merge_shards(shards, tmp_path / "index.arrow")
    return tmp_path / "index.arrow"


# Round trip


def test_reader_gives_back_what_was_scored(index_path):
    index = TokenIndex.open(index_path)
    assert len(index) == index.header.num_examples == NUM_EXAMPLES
    assert index.header.num_tokens == sum(example(row).num_tokens for row in range(NUM_EXAMPLES))
    assert index.header.fingerprints == FINGERPRINTS
    for row in range(NUM_EXAMPLES):
        expected = example(row)
        context, gradient = index.scores(row)
        assert context.dtype == gradient.dtype == np.float32
        np.testing.assert_array_equal(context, expected.context)
        np.testing.assert_array_equal(gradient, expected.gradient)
        assert not context.flags.writeable
        assert index.num_tokens(row) == expected.num_tokens
        assert index.tokens_crc(row) == expected.tokens_crc
        assert index.example_id(row) == expected.example_id
        assert index.row_of(expected.example_id) == row


def test_unknown_rows_and_ids_are_refused(index_path):
    index = TokenIndex.open(index_path)
    with pytest.raises(UserError, match="no example 'nobody'"):
        index.row_of("nobody")
    for row in (-1, NUM_EXAMPLES):
        for method in (index.scores, index.num_tokens, index.tokens_crc, index.example_id):
            with pytest.raises(UserError, match=f"row is {row}.*rows 0 to {NUM_EXAMPLES - 1}"):
                method(row)


def test_pandas_reads_an_index(index_path):
    frame = pandas.read_feather(index_path)
    assert frame["row"].tolist() == list(range(NUM_EXAMPLES))
    assert frame["example_id"][3] == example(3).example_id
    np.testing.assert_array_equal(frame["gradient"][3], example(3).gradient)


def test_pickled_reader_maps_the_file_again(index_path):
    index = TokenIndex.open(index_path)
    index.row_of(example(1).example_id)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).scores(4)[0], example(4).context)


def test_reader_survives_a_change_of_folder(index_path, monkeypatch):
    monkeypatch.chdir(index_path.parent)
    index = TokenIndex.open(index_path.name)
    monkeypatch.chdir("/")
    assert len(pickle.loads(pickle.dumps(index))) == NUM_EXAMPLES


def test_tokens_crc_is_of_little_endian_int32():
    expected = zlib.crc32(b"\x01\x00\x00\x00\x00\x01\x00\x00")
    for tokens in ([1, 256], (1, 256), np.array([1, 256], np.int64), np.array([1, 256], ">i4")):
        assert tokens_crc(tokens) == expected


# Independence of processes and order


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_merged_bytes_do_not_depend_on_processes(tmp_path, index_path, num_processes):
    folder = tmp_path / "parallel"
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=work, args=(folder, "run", seed)) for seed in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    merge_shards(folder, tmp_path / "parallel.arrow")
    assert (tmp_path / "parallel.arrow").read_bytes() == index_path.read_bytes()


@pytest.mark.parametrize("num_shards", [1, 2, 23])
def test_merged_bytes_do_not_depend_on_the_division_into_shards(tmp_path, index_path, num_shards):
    write_shards(tmp_path / "other", reversed(range(num_shards)), num_shards)
    merge_shards(tmp_path / "other", tmp_path / "other.arrow")
    assert (tmp_path / "other.arrow").read_bytes() == index_path.read_bytes()


def test_merged_bytes_do_not_depend_on_the_order_of_settings(tmp_path, index_path):
    reordered = [dict(reversed(settings.items())) for settings in (HEADER.fingerprints, HEADER.scoring)]
    write_shards(tmp_path / "other", header=IndexHeader(*reordered))
    merge_shards(tmp_path / "other", tmp_path / "other.arrow")
    assert (tmp_path / "other.arrow").read_bytes() == index_path.read_bytes()


def test_merge_of_many_record_batches(tmp_path, index_path, monkeypatch):
    monkeypatch.setattr(schema, "_BATCH_TOKENS", 50)
    outputs = []
    for num_shards in (1, 4):
        write_shards(tmp_path / f"s{num_shards}", num_shards=num_shards)
        merge_shards(tmp_path / f"s{num_shards}", tmp_path / f"{num_shards}.arrow")
        outputs.append((tmp_path / f"{num_shards}.arrow").read_bytes())
    assert outputs[0] == outputs[1] != index_path.read_bytes()
    with pa.ipc.open_file(tmp_path / "1.arrow") as reader:
        batches = [reader.get_batch(i)["num_tokens"].to_pylist() for i in range(reader.num_record_batches)]
    assert len(batches) > 3
    for lengths in batches[:-1]:
        assert sum(lengths[:-1]) < 50 <= sum(lengths), "a batch ends with the example that fills it"
    index = TokenIndex.open(tmp_path / "1.arrow")
    for row in range(NUM_EXAMPLES):
        np.testing.assert_array_equal(index.scores(row)[1], example(row).gradient)


def test_a_merge_holds_no_shard_open(tmp_path):
    """More shards than file descriptors."""
    header = IndexHeader(FINGERPRINTS)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    store = ShardStore(tmp_path / "many", header, num_shards=80)
    for shard in range(80):
        store.write(shard, [example(shard)])
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        assert merge_shards(tmp_path / "many", tmp_path / "many.arrow").num_examples == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Crashes and resuming


def test_half_written_shard_is_ignored_and_overwritten(tmp_path, index_path):
    folder = tmp_path / "crashed"
    write_shards(folder, shards=[0, 1, 3])
    (folder / "shard-00002.arrow.incomplete").write_bytes(b"ARROW1\0\0 half a shard")
    store = ShardStore(folder, HEADER, NUM_SHARDS)
    assert store.finished() == {0, 1, 3}
    assert not store.is_finished(2)
    with pytest.raises(UserError, match="2 of 5 shards .* not finished: 2, 4"):
        merge_shards(folder, tmp_path / "merged.arrow")
    assert not (tmp_path / "merged.arrow").exists()

    written = {shard: store.path(shard).stat().st_mtime_ns for shard in (0, 1, 3)}
    work(folder, "second-run", 0)
    assert written == {shard: store.path(shard).stat().st_mtime_ns for shard in (0, 1, 3)}, "scored again"
    merge_shards(folder, tmp_path / "merged.arrow")
    assert (tmp_path / "merged.arrow").read_bytes() == index_path.read_bytes()
    assert not list(folder.glob("*.incomplete"))


def test_half_written_merge_is_overwritten(tmp_path, shards, index_path):
    (tmp_path / "again.arrow.incomplete").write_bytes(b"half")
    merge_shards(shards, tmp_path / "again.arrow")
    assert (tmp_path / "again.arrow").read_bytes() == index_path.read_bytes()
    assert not (tmp_path / "again.arrow.incomplete").exists()


def kill_in_the_middle(folder: Path) -> None:
    def examples():
        for row in shard_rows(4):
            yield example(row)
        os._exit(9)

    # Below `ShardStore.write`, which gathers its examples first: the file is open and partly written here.
    schema._BATCH_ROWS = 1
    write_examples(ShardStore(folder, HEADER, NUM_SHARDS).path(4), HEADER, examples())


def test_killed_process_leaves_no_shard(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=kill_in_the_middle, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert (tmp_path / "shard-00004.arrow.incomplete").stat().st_size > 0
    assert ShardStore.open(tmp_path).finished() == set()


@pytest.mark.parametrize("write", ["shard", "merge"])
def test_full_disk_leaves_nothing(tmp_path, shards, write):
    """A file size limit makes write() fail half-way, as a full disk does."""
    store = ShardStore.open(shards)
    store.path(0).unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if write == "merge":
        write_shards(shards, [0])
    before = set(tmp_path.rglob("*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_shards(shards, [0]) if write == "shard" else merge_shards(shards, tmp_path / "index.arrow")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert set(tmp_path.rglob("*")) == before


def test_disk_that_fills_up_at_the_sync_leaves_nothing(tmp_path, monkeypatch):
    store = ShardStore(tmp_path, HEADER, NUM_SHARDS)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    message = "(?s)no room to write .*shard-00000.*No space left.*run the same command again"
    with pytest.raises(UserError, match=message):
        store.write(0, [example(0)])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_file_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    store = ShardStore(tmp_path, HEADER, NUM_SHARDS)
    calls = []
    fsync, rename = os.fsync, os.replace

    def spy_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_replace(source, target):
        calls.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    store.write(0, [example(0)])
    shard = str(store.path(0))
    assert calls == [("fsync", shard + ".incomplete"), ("rename", shard), ("fsync", str(tmp_path))]


# Claims and plans


def test_each_shard_is_claimed_once_per_run(tmp_path):
    store = ShardStore(tmp_path, HEADER, NUM_SHARDS)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda _: store.claim(2, "run-a"), range(64)))
    assert sum(won) == 1
    assert store.claim(3, "run-a")
    assert store.claim(2, "run-b"), "the claim of a run that was killed binds nobody"
    store.write(2, [example(0)])
    assert not store.claim(2, "run-c"), "a finished shard is not scored again"


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "../up"])
def test_run_id_must_name_a_folder(tmp_path, run_id):
    with pytest.raises(UserError, match="run_id"):
        ShardStore(tmp_path, HEADER, NUM_SHARDS).claim(0, run_id)


@pytest.mark.parametrize(
    ("header", "num_shards", "message"),
    [
        (
            IndexHeader(FINGERPRINTS | {"data": "d2"}, HEADER.scoring),
            5,
            "fingerprints.data: the folder has 'd1', .*'d2'",
        ),
        (
            IndexHeader(FINGERPRINTS, {"gradient": "l2"}),
            5,
            "scoring.gradient: .*'abs'.*'l2'\n *scoring.layers: .*nothing",
        ),
        (IndexHeader(FINGERPRINTS, HEADER.scoring, num_examples=9), 5, "num_examples: .*None.*9"),
        (HEADER, 6, "num_shards: the folder has 5, this run has 6"),
    ],
)
def test_folder_of_another_plan_is_refused(shards, header, num_shards, message):
    with pytest.raises(UserError, match=f"(?s){message}.*Delete the folder"):
        ShardStore(shards, header, num_shards)


def test_same_plan_is_accepted_again(shards):
    assert ShardStore(shards, HEADER, NUM_SHARDS).finished() == ShardStore.open(shards).finished() == set(range(5))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"header": {}, "num_shards": 5}', '{"num_shards": 5}'])
def test_damaged_plan_is_refused(shards, text):
    (shards / "plan.json").write_text(text)
    for call in (lambda: ShardStore(shards, HEADER, NUM_SHARDS), lambda: ShardStore.open(shards)):
        with pytest.raises(UserError, match="not a plan.*Delete the folder"):
            call()


def test_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no shards"):
        merge_shards(tmp_path, tmp_path / "index.arrow")


def test_shard_numbers_outside_the_plan_are_refused(tmp_path):
    store = ShardStore(tmp_path, HEADER, NUM_SHARDS)
    (tmp_path / "shard-00007.arrow").touch()
    assert store.finished() == set()
    for shard in (-1, 5):
        with pytest.raises(UserError, match="shards 0 to 4"):
            store.write(shard, [example(0)])


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
