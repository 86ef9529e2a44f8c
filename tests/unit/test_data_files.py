"""Which files are read as data, how they are read, and what is said of those that cannot be."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers import tiny_tokenizer, write_jsonl
from prepared_data import answers, prepare, refusal, texts, write

from tokenseek.config import DataConfig, load_data_of_model
from tokenseek.data import prepare_dataset
from tokenseek.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_row_24_a_path_is_no_pattern(tmp_path):
    rows = [{"instruction": "a", "response": text} for text in ("plain", "brackets", "star")]
    for name, row in zip(("data1.jsonl", "data[1].jsonl", "data*.jsonl"), rows, strict=True):
        write_jsonl(tmp_path / name, [row])
    for name, row in zip(("data1.jsonl", "data[1].jsonl", "data*.jsonl"), rows, strict=True):
        assert answers(tmp_path / name) == [f"{row['response']}</s>"]


def test_row_25_hidden_files_are_left_out_and_told(tmp_path):
    folder = tmp_path / ".mine" / "data"  # the folder itself may lie in a hidden one
    for name in (
        "a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "sub/b.jsonl",
        "__MACOSX/b.jsonl",
        "sub/._b.jsonl",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [{"instruction": "q", "response": name}])
    assert answers(folder) == ["a.jsonl</s>", "sub/b.jsonl</s>"]
    [note] = prepare(folder).report.notes
    assert "3 file(s)" in note and "left out, hidden" in note and ".ipynb_checkpoints/a-checkpoint.jsonl" in note
    (tmp_path / "only/.x").mkdir(parents=True)
    write_jsonl(tmp_path / "only/.x/a.jsonl", [{"a": 1}])
    assert "holds no file of the kinds .json, .jsonl, .csv, .tsv, .parquet that is not hidden (1 are)" in refusal(
        tmp_path / "only"
    )


def test_the_cache_knows_the_content_and_not_the_time(tmp_path):
    import os

    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "response": "one"}])
    stamp = path.stat()
    assert answers(path) == ["one</s>"]
    write_jsonl(path, [{"instruction": "a", "response": "two"}])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    assert answers(path) == ["two</s>"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "response": "one"}])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    message = refusal(path)
    assert f"prepared data cannot be kept in {tmp_path / 'file'}" in message and "HF_DATASETS_CACHE" in message


def test_errors_of_worker_processes_name_the_row(tmp_path):
    rows = [{"instruction": "a", "response": "one"}] * 5 + [{"instruction": "a", "response": [1]}]
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", rows), num_proc=2)
    assert "data.sources.0: rows.jsonl, line 6: column 'response' holds [1], a list" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2]", "rows.json, row 1: a row is a JSON object with named columns, got 1"),
        ('[{"a": 1}', "rows.json, behind row 1: not valid JSON: ',' or ']' is expected"),
        ('[{"a": 1}] x', "there is text behind the list"),
        ('[{"a": 1}, {"b": }]', "rows.json, row 2: not valid JSON"),
        ('{"data":\n [{"a": 1}]}', "rows.json: one object, whose 'data' is a list of 1 objects"),
        ('"text"', "rows.json, line 1: a row is a JSON object"),
        ('{"a": ' + "[" * 100_000, "rows.json, line 1: not valid JSON"),
    ],
)
def test_unusable_json(tmp_path, content, expected):
    assert expected in refusal(write(tmp_path / "rows.json", content))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"instruction": "a", "response": true}', "column 'response' holds True, a bool; accepted is text"),
        ('{"instruction": "a", "response": ["b"]}', "column 'response' holds ['b'], a list; accepted is text"),
        ('{"instruction": "a", "response": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_cells_that_are_no_text_are_named(tmp_path, row, expected):
    message = refusal(write(tmp_path / "rows.jsonl", '{"instruction": "a", "response": "b"}\n\n' + row))
    assert "data.sources.0: rows.jsonl, line 3: " in message and expected in message
    assert "drop" not in message or "surrogate" in message


def test_unreadable_parquet(tmp_path):
    assert "rows.parquet: not a Parquet file" in refusal(write(tmp_path / "rows.parquet", "text"))


@pytest.mark.parametrize(("split", "kept"), [("train[:2]", [0, 1]), ("all[50%:]", [2, 3]), ("train[-1:]", [3])])
def test_a_split_slices_a_local_file(tmp_path, split, kept):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"t{number}"} for number in range(4)])
    assert texts(path, source={"kind": "text", "split": split}) == [f"t{number}</s>" for number in kept]
    assert "is not a split such as train" in refusal(path, source={"kind": "text", "split": "train[x]"})


def test_rows_of_the_hub_are_read_alike(tmp_path, monkeypatch):
    from datasets import Dataset

    table = Dataset.from_dict({"instruction": ["a"], "response": pa.array([0.1], pa.float32())})
    monkeypatch.setattr("tokenseek.data.sources.load_dataset", lambda *_, **__: table)
    data = DataConfig.model_validate({"sources": [{"name": "some/set"}], "template": "plain"})
    prepared = prepare_dataset(data, tiny_tokenizer())
    assert tiny_tokenizer().decode(prepared.dataset[0]["input_ids"]) == "a\n\n0.1</s>"


def test_rows_are_cached_as_json_texts(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "n": 1}])
    from tokenseek.config import SourceConfig
    from tokenseek.data.sources import load_source

    loaded = load_source(SourceConfig(path=str(path)), "data.sources.0")
    assert json.loads(loaded.rows[0]["row"]) == {"text": "a", "n": 1}
    assert loaded.rows[0]["place"] == "rows.jsonl, line 1" and loaded.columns == ("text", "n")
    assert len(list((tmp_path / "cache/tokenseek").iterdir())) == 1


ROWS = '{"instruction": "a", "response": "b"}\n{"instruction": "c", "response": "d"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", gzip.compress(ROWS.encode())),
        ("rows.json.GZ", gzip.compress(("[" + ROWS.strip().replace("\n", ",") + "]").encode())),
        ("rows.csv.gz", gzip.compress(b"\xef\xbb\xbfinstruction,response\na,b\nc,d\n")),
        ("ROWS.JSONL", ROWS),
        ("Rows.Csv", b"instruction,response\ra,b\rc,d\r"),
        ("rows.json", ROWS),
    ],
    # Compressed bytes hold the time, and the processes that share the tests have to agree on their names.
    ids=["jsonl.gz", "json.GZ", "csv.gz", "JSONL", "Csv", "json"],
)
def test_compressed_files_and_suffixes_in_capitals(tmp_path, name, content):
    assert answers(write(tmp_path / name, content)) == ["b</s>", "d</s>"]


def test_folders_have_files_in_capitals_and_compressed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "A.JSONL", ROWS)
    write(folder / "b.jsonl.gz", gzip.compress(ROWS.encode()))
    write(folder / "dataset_infos.json", "{}")
    prepared = prepare(folder)
    assert len(prepared.dataset) == 4 and "dataset_infos.json" in prepared.report.notes[0]


def test_a_damaged_compressed_file_is_named(tmp_path):
    whole = gzip.compress(ROWS.encode() * 100)
    assert "rows.jsonl.gz: the compressed file is cut off" in refusal(write(tmp_path / "rows.jsonl.gz", whole[:-12]))
    assert "plain.jsonl.gz: cannot be read: Not a gzipped file" in refusal(write(tmp_path / "plain.jsonl.gz", ROWS))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "rows.jsonl",
            '{"instruction": "a", "response": "b", "response": "c"}\n',
            "rows.jsonl, line 1: not valid JSON: an object has ['response'] more than once",
        ),
        ("rows.json", '[{"a": {"x": 1, "x": 2}}]', "rows.json, row 1: not valid JSON: an object has ['x'] more than"),
        ("rows.jsonl", "[\n" + ROWS.split("\n")[0] + "\n]", "A file that is one list of objects is named .json"),
        ("rows.jsonl", '[{"role": "user", "content": "a"}]\n', 'a conversation is written as {"messages": [...]}'),
        (
            "rows.json",
            '{\n "version": 1,\n "data": [{"instruction": "a"}, {"instruction": "b"}]\n}',
            "one object, whose 'data' is a list of 2 objects",
        ),
        ("rows.json", '{"instruction": ["a", "b"], "response": ["c", "d"]}', "a list of cells for each column"),
        (
            "rows.csv",
            "instruction;response\na;b\n",
            "whose names seem to be parted by ';'; .csv files are read with ','",
        ),
        ("rows.tsv", "instruction,response\na,b\n", "whose names seem to be parted by ','"),
    ],
)
def test_one_cause_one_message(tmp_path, name, content, expected):
    assert expected in refusal(write(tmp_path / name, content))


def test_one_object_may_be_written_over_many_lines(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "rows.json", json.dumps({"messages": messages}, indent=2))
    assert answers(path, source={"kind": "chat"})[0].startswith("b")
    path = write(tmp_path / "rows.json", json.dumps({"instruction": "a", "response": "b"}, indent=2) + "\n")
    assert answers(path) == ["b</s>"]


def test_parquet_columns_of_one_name(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["instruction", "response", "response"])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "there are several columns of the name ['response']" in refusal(tmp_path / "rows.parquet")


def test_a_link_to_nothing_is_told(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS)
    (folder / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "b.jsonl is a link to nothing" in refusal(folder)


def test_a_folder_of_save_to_disk_says_how_to_write_it(tmp_path):
    Dataset.from_list([{"instruction": "a", "response": "b"}]).save_to_disk(tmp_path / "saved")
    message = refusal(tmp_path / "saved")
    assert "was written by save_to_disk" in message and "to_parquet('train.parquet')" in message


def test_files_named_like_held_out_data_are_told(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "latest.jsonl"):
        write(folder / name, ROWS)
    assert not prepare(folder).report.notes
    write(folder / "test-00000.jsonl", ROWS)
    [note] = prepare(folder).report.notes
    assert "3 files, all of which are read; test-00000.jsonl is named like held-out data" in note


@pytest.mark.parametrize("address", ["https://example.com/a.jsonl", "hf://datasets/a/b/c.jsonl", "s3://a/b.csv"])
def test_an_address_is_no_path(address):
    with pytest.raises(UserError, match=f"{address} is an address; data are files and folders of this machine"):
        load_data_of_model("m", address)
