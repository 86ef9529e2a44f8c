"""Bad input: exit status 2, one message that says what to do, no traceback, and no model is loaded for it."""

import json
import re
import shutil

import pytest
import torch
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from tokenseek import cli
from tokenseek.config import load_config
from tokenseek.errors import UserError
from tokenseek.launching import launcher
from tokenseek.runs.score import score


@pytest.fixture(scope="module")
def index(workspace):
    """An index of the training data; made without the launcher, as all of this file is."""
    return score(load_config(workspace.training, [f"output_dir={workspace.folder}/bad"]))


@pytest.fixture(scope="module")
def models(workspace):
    """Folders that hold something else than the model: name -> path."""
    folder = workspace.folder / "models"
    tokenizer = tiny_tokenizer()
    sizes = dict(vocab_size=400, num_attention_heads=2)
    bert = BertConfig(**sizes, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    t5 = T5Config(vocab_size=400, d_model=32, num_layers=2, num_heads=2, d_ff=48, d_kv=16)
    made = {"bert": BertModel(bert), "t5": T5ForConditionalGeneration(t5)}
    made["other-weights"] = tiny_model("llama", seed=1, vocab_size=400, max_position_embeddings=512)
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    copies = ["other-tokenizer", "no-tokenizer", "truncated-weights", "unknown-type"]
    for name in copies:
        shutil.copytree(workspace.model, folder / name)
    tiny_tokenizer(bos=True).save_pretrained(folder / "other-tokenizer")
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    weights = folder / "truncated-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((folder / "unknown-type" / "config.json").read_text())
    (folder / "unknown-type" / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def refused(workspace, index, script, monkeypatch):
    """The message with which training (or scoring) with these settings is refused."""

    def no_model(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("tokenseek.runs.score.load_model", no_model)
    monkeypatch.setattr("tokenseek.runs.train.load_model", no_model)

    def run(*settings, name="train"):
        output = ["--set", f"output_dir={workspace.folder}/refused", "--set", f"scoring.index={index}"]
        overrides = [word for setting in settings for word in ("--set", setting)]
        return script(name, "--preset", workspace.training, *output, *overrides).refusal()

    return run


@pytest.mark.parametrize("name", ["score", "train"])
@pytest.mark.parametrize(
    "setting,expected",
    [
        ("training.learnig_rate=1", "training.learnig_rate: unknown key.*did you mean learning_rate"),
        ("selection.ratio=0", r"selection.ratio.*\(0, 1\]"),
        ("selection.ratio=1.5", r"selection.ratio.*\(0, 1\]"),
        ("data.sources.0.path=no.jsonl", "data.sources.0.path: no file or folder 'no.jsonl'"),
        (
            "data.sources.0.columns.instruction=questoin",
            "no column 'questoin'.*did you mean question.*question, answer",
        ),
        ("data.sources.0.columns.response=solution", "data.sources.0.columns.response: the data has no column"),
        ("data.sources.0.keep={question: [nothing]}", "drop all 21 rows"),
        ("model.name_or_path=/no/such/folder", "model.name_or_path: there is no folder /no/such/folder"),
        ("model.name_or_path={models}/empty", "holds no config.json"),
        ("model.name_or_path={models}/no-tokenizer", "holds no tokenizer"),
        ("model.name_or_path={models}/truncated-weights", "model.safetensors is truncated"),
        ("model.name_or_path={models}/bert", "bert: .*not a causal decoder.*Accepted: decoder-only models"),
        ("model.name_or_path={models}/t5", "t5 is no causal language model"),
        ("model.name_or_path={models}/unknown-type", "unknown-type is no causal language model.*lama"),
        ("model.name_or_path={models}/other-weights", "index.arrow was not made for this run:.*model: the index has"),
        ("model.name_or_path={models}/other-tokenizer", "not made for this run:.*tokenizer: the index has"),
        ("data.template=plain", "not made for this run:.*template: the index has"),
        ("data.max_length=200", "not made for this run:.*max_length: the index has 256, this run has 200"),
        ("data.labels=sequence", "not made for this run:.*labels: the index has 'response'"),
        ("data.limit=20", "not made for this run:.*data: the index has.*Score again"),
    ],
)
def test_settings_and_data(name, setting, expected, refused, models):
    message = refused(setting.replace("{models}", str(models)), name=name)
    assert_matches(message, expected)


def assert_matches(message, expected):
    assert re.search(expected, message, re.DOTALL), message


def test_empty_data(refused, workspace):
    empty = workspace.folder / "empty.jsonl"
    empty.write_text("")
    assert_matches(refused(f"data.sources.0.path={empty}"), "is empty; give data with at least one row")
    header = workspace.folder / "header.csv"
    header.write_text("question,answer\n")
    assert_matches(refused(f"data.sources.0.path={header}"), "no rows in .*header.csv")


def test_held_out_data(refused):
    message = refused("eval_data.sources.0.columns.response=solution")
    assert_matches(message, "eval_data.sources.0.columns.response: the data has no column 'solution'")


@pytest.mark.parametrize("setting", ["resume=/no/checkpoint", "resume=yes"])
def test_resume(setting, refused):
    assert_matches(refused(f"training.{setting}"), "training.resume.*accepted are 'auto', 'never' or the path")


@pytest.mark.parametrize("keep", [0, 100, 2000, -1])
def test_truncated_index(keep, refused, index, tmp_path):
    damaged = tmp_path / "index.arrow"
    damaged.write_bytes(index.read_bytes()[:keep])
    assert_matches(refused(f"scoring.index={damaged}"), "index.arrow is truncated or damaged.*score again")


def test_flipped_bit_in_the_index(refused, index, tmp_path):
    damaged, content = tmp_path / "index.arrow", bytearray(index.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    assert_matches(refused(f"scoring.index={damaged}"), r"example '\S+' \(row \d+\) .*checksum.*score again")


def test_other_ways_of_scoring(refused, tmp_path):
    message = refused("scoring.reduction=l2", name="score")
    assert_matches(message, "was scored with other settings:.*reduction: the index has 'abs', this run has 'l2'")
    other = f"scoring.index={tmp_path}/other.arrow"
    with pytest.raises(AssertionError, match="the model was loaded"):
        refused(other, name="score")  # is in order; the folder of its shards is made before the model is loaded
    message = refused(other, "scoring.reduction=l2", name="score")
    assert_matches(message, "holds the shards of another scoring run:.*reduction.*Delete the folder")


def test_scores_that_are_not_finite(workspace, script, tmp_path):
    broken = shutil.copytree(workspace.model, tmp_path / "nan")
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    settings = ["--set", f"model.name_or_path={broken}", "--set", f"output_dir={tmp_path}"]
    message = script("score", "--preset", workspace.training, *settings).refusal()
    assert_matches(message, r"Example '\S+' \(row \d+\) cannot be scored: .*check them for values that are not finite")
    assert not (tmp_path / "index.arrow").exists()


def test_what_only_one_process_knows_is_told_by_it(monkeypatch, capsys):
    def fail():
        raise UserError("a fault of this process")

    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert cli.guarded(fail) == 2 and waited == []
    monkeypatch.setenv("RANK", "1")
    assert cli.guarded(fail) == 2 and len(waited) == 1  # for the main process to tell it, and the launcher to end us
    assert capsys.readouterr().err.count("a fault of this process") == 2


def test_the_status_survives_the_launcher(workspace, tmp_path):
    """Two processes, of which only the main one reads the data; the other is told."""
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "1 + 1?", "solution": "2"}])
    arguments = ["--preset", workspace.training, "--set", f"output_dir={tmp_path}"]
    result = workspace.tokenseek(
        "train", "--accelerate-config", "ddp_cpu", *arguments, "--set", f"data.sources.0.path={data}"
    )
    assert_matches(result.refusal(), "data.sources.0.columns.response: the data has no column 'answer'")


def test_mistakes_are_told_before_anything_is_launched(console, workspace, monkeypatch):
    monkeypatch.setattr(launcher, "accelerate_launch", lambda _: pytest.fail("it was launched"))
    train = ["train", "--preset", workspace.training]
    assert_matches(console(*train, "--set", "selection.rul=all").refusal(), "did you mean rule")
    assert_matches(console(*train, "--accelerate-config", "dpp").refusal(), "did you mean ddp")
    assert_matches(console("score", "--preset", "gsm9k").refusal(), "did you mean gsm8k")
    assert_matches(console("reproduce", "S13", "--preset", workspace.training).refusal(), "give --seeds 2 or more")
