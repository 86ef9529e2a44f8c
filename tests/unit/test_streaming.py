"""Streamed data: the examples of prepared data, in the same order, shared by processes, resumable; what is refused."""

import itertools
import json
import shutil

import pytest
from helpers import tiny_tokenizer, write_jsonl
from tiny_preset import tiny_preset

from tokenseek.config import DataConfig
from tokenseek.data import prepare_dataset, stream_examples
from tokenseek.data.toy import make_word_problems
from tokenseek.errors import UserError
from tokenseek.runs.score import score
from tokenseek.runs.train import train

COLUMNS = {"instruction": "question", "response": "answer"}
STREAMED = (
    "data.sources.0.streaming=true",
    "scoring.mode=online",
    "selection.rule=sampled",
    "selection.alpha=0",
    "selection.explore=0.3",
    "training.logging_steps=1",
    "training.max_steps=4",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    problems = [{**problem, "part": "ab"[number % 2]} for number, problem in enumerate(make_word_problems(10))]
    write_jsonl(folder / "1.jsonl", problems[:6])
    write_jsonl(folder / "2.jsonl", problems[6:])
    return folder


def data_of(rows, streaming, name="path", **options):
    source = {name: str(rows), "columns": COLUMNS, "streaming": streaming, **options.pop("source", {})}
    return DataConfig.model_validate({"sources": [source], "max_length": 256, **options})


def take(count, data, **options):
    return list(itertools.islice(iter(stream_examples(data, tiny_tokenizer(), **options)), count))


@pytest.mark.parametrize("options", [{}, {"source": {"drop": {"part": ["a"]}}}, {"limit": 3}], ids=str)
def test_a_stream_has_the_examples_of_prepared_data(rows, options):
    prepared = prepare_dataset(data_of(rows, False, **dict(options)), tiny_tokenizer()).dataset
    streamed = take(2 * len(prepared), data_of(rows, True, **dict(options)))
    assert [example["visit"] for example in streamed] == [0] * len(prepared) + [1] * len(prepared)
    for example, expected in zip(streamed, [*prepared, *prepared], strict=True):
        assert example["example_id"] == expected["example_id"]
        assert list(example["input_ids"]) == expected["input_ids"] and list(example["labels"]) == expected["labels"]


def test_a_data_set_of_the_hub_is_streamed_too(rows):
    by_name, by_path = (take(10, data_of(rows, True, name)) for name in ("name", "path"))
    assert [e["example_id"].split("-")[1] for e in by_name] == [e["example_id"].split("-")[1] for e in by_path]


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_a_stream_and_a_run_goes_on_in_it(rows, shuffle):
    data = data_of(rows, True, shuffle=shuffle)
    ids = [(e["visit"], e["example_id"]) for e in take(23, data)]
    parts = [take(7, data, part=part, parts=3, skip=2) for part in range(3)]
    assert [(e["visit"], e["example_id"]) for turn in zip(*parts, strict=True) for e in turn] == ids[2:]
    first, second = [i for _, i in ids[:10]], [i for _, i in ids[10:20]]
    assert sorted(first) == sorted(second) and len(set(first)) == 10  # each once in a pass
    assert (first != second and first != sorted(first)) == shuffle


def lines(run):
    keys = ("step", "loss", "loss_all", "grad_norm")
    return [[line.get(key) for key in keys] for line in map(json.loads, (run / "metrics.jsonl").open())]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, packing, capsys):
    """Twelve rows, steps of eight: draws and dropout go on in the second pass."""
    settings = (*STREAMED, "training.save_strategy=steps", "training.save_steps=2", f"training.packing={packing}")
    assert train(tiny_preset(tmp_path, *settings)).steps == 4
    assert "data.sources.0 is streamed: this report covers its first 12 rows" in capsys.readouterr().out
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run", resumed, ignore=shutil.ignore_patterns("checkpoint-4", "summary.json"))
    train(tiny_preset(tmp_path, *settings, f"output_dir={resumed}"))
    assert lines(resumed) == lines(tmp_path / "run")


def test_a_streamed_run_takes_the_steps_of_a_prepared_one(tmp_path):
    ordered = ("training.extra={disable_tqdm: true, train_sampling_strategy: sequential}",)
    ordered += ("training.max_steps=1", "peft.dropout=0.0")
    train(tiny_preset(tmp_path, *STREAMED, *ordered))
    prepared = tmp_path / "prepared"
    train(tiny_preset(tmp_path, *STREAMED, *ordered, "data.sources.0.streaming=false", f"output_dir={prepared}"))
    assert lines(tmp_path / "run")[0] == lines(prepared)[0]


@pytest.mark.parametrize(
    "settings,message",
    [
        (["training.max_steps=-1"], "streaming: true has no end: set training.max_steps"),
        (["scoring.mode=index"], "streaming: true has no index.*scoring.mode: online"),
        (["training.packing=bins"], "packing: bins packs all data before training"),
        (["data.hold_out=3"], "hold_out draws from all rows.*eval_data"),
        (["data.sources.0.rows=3"], "leave weight and rows out"),
        (["data.sources.0.split='train[:5]'"], "needs all of it"),
        (["data.sources.1.path=other.jsonl"], "every source needs streaming: true"),
        (["training.dataloader_num_workers=2"], "a stream is read by one worker"),
        (["eval_data={sources: [{path: a.jsonl, streaming: true}]}"], "eval_data is measured again and again"),
    ],
)
def test_what_a_stream_cannot_do(settings, message, tmp_path):
    with pytest.raises(UserError, match=f"(?s){message}"):
        tiny_preset(tmp_path, *STREAMED, *settings)


def test_no_index_is_made_of_a_stream(tmp_path):
    with pytest.raises(UserError, match="streaming: true has no end, and an index is of all data"):
        score(tiny_preset(tmp_path, *STREAMED))


def test_bad_rows_are_named(rows, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(UserError, match=r"data.sources.0.path: .*bad.jsonl.*2"):
        take(2, data_of(tmp_path / "bad.jsonl", True))
    with pytest.raises(UserError, match="no file or folder"):
        take(1, data_of(tmp_path / "missing.jsonl", True))
    with pytest.raises(UserError, match="of the first 10 rows of .* none is left"):
        take(1, data_of(rows, True, source={"keep": {"part": ["c"]}}))
    with pytest.raises(UserError, match="no column 'paart'"):
        take(1, data_of(rows, True, source={"keep": {"paart": ["a"]}}))
