"""`tokenseek export-positions`: the file has the positions that training selects, and what they were made with."""

import numpy as np
import pytest
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model
from tiny_run import write_index

import tokenseek
from tokenseek.cli import main
from tokenseek.data.toy import make_word_problems
from tokenseek.index.positions import SelectedPositions
from tokenseek.runs.inputs import run_fingerprints


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The words of a run with an index, its data and its index."""
    folder = tmp_path_factory.mktemp("scored")
    write_jsonl(folder / "train.jsonl", make_word_problems(8))
    tiny_model("llama", vocab_size=400, max_position_embeddings=512).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    settings = [
        f"model.name_or_path={folder / 'model'}",
        f"data.sources.0.path={folder / 'train.jsonl'}",
        f"output_dir={folder / 'run'}",
        "selection.rule=top",
    ]
    config = tokenseek.load_config("gsm8k", settings)
    prepared = tokenseek.prepare_dataset(config.data, tokenizer)
    (folder / "run").mkdir()
    path = write_index(folder / "run" / "index.arrow", prepared.dataset, run_fingerprints(config.model, prepared))
    words = ["export-positions", "--preset", "gsm8k", *(f"--set={setting}" for setting in settings)]
    return words, prepared.dataset, tokenseek.TokenIndex.open(path)


def test_the_file_has_what_training_selects(scored, tmp_path, capsys):
    words, dataset, index = scored
    assert main([*words, "--ratio", "0.5", "--output", str(tmp_path / "half.npz")]) == 0
    read = SelectedPositions.load(tmp_path / "half.npz")
    collator = tokenseek.TokenSeekCollator(index, 0.5, "top")
    assert len(read) == len(dataset) == 8
    for row, example in enumerate(dataset):
        np.testing.assert_array_equal(read[row], collator.select(example))
    assert read.facts["fingerprints"] == index.header.fingerprints
    assert read.facts["ratio"] == read.facts["selection"]["ratio"] == 0.5 and read.facts["selection"]["rule"] == "top"
    tokens = sum(map(len, dataset["input_ids"]))
    assert f"8 examples, {tokens:,} tokens, {-(-tokens // 8):,} bytes of bits" in capsys.readouterr().out


def test_the_ratio_and_the_place_of_the_run_are_the_defaults(scored):
    words, _, index = scored
    assert main([*words, "--set=selection.ratio=0.2"]) == 0
    assert SelectedPositions.load(index.path.with_name("positions.npz")).facts["ratio"] == 0.2


@pytest.mark.parametrize(
    "more, told",
    [
        (["--set=selection.rule=random"], "rule 'random' draws again in every epoch"),
        (["--set=selection.rule=all", "--ratio=0.5"], "rule 'all' does not depend on a ratio"),
        (["--ratio=1.5"], "ratio"),
        (["--output=no/such/folder/positions.npz"], "there is no folder no/such/folder"),
        (["--output=."], "is a folder"),
        (["--set=data.max_length=20"], "was not made for this run"),
    ],
)
def test_what_cannot_be_exported_is_refused(scored, more, told, capsys):
    assert main([*scored[0], *more]) == 2
    assert told in capsys.readouterr().err
