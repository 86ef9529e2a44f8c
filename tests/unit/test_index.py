"""The token-position index: shards, merge and reader, under crashes and any number of processes."""

import errno
import multiprocessing
import os
import pickle
import resource
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
from index_shards import (
    FINGERPRINTS,
    HEADER,
    NUM_EXAMPLES,
    NUM_SHARDS,
    example,
    shard_rows,
    work,
    write_shards,
)

from tokenseek.errors import UserError
from tokenseek.index import IndexHeader, ShardStore, TokenIndex, merge_shards, schema, tokens_crc
from tokenseek.index.files import write_examples

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
