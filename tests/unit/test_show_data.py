"""`tokenseek data`: what a model would be trained on, told and shown, without its weights."""

import pytest
from helpers import tiny_tokenizer, write_jsonl

from tokenseek import cli
from tokenseek.config import load_data_of_model, recognised_data
from tokenseek.errors import UserError
from tokenseek.reporting import render_labels
from tokenseek.runs.data import show_data

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model(tmp_path):
    """A folder without weights."""
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_labels_in_colour_and_without():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a\nb c")["input_ids"]
    labels = [-100, -100, *ids[2:]]
    plain = render_labels(tokenizer, ids, labels, color=False)
    assert plain == "a|↵\n[[b| c]]" and len(ids) == 4
    coloured = render_labels(tokenizer, ids, labels, color=True)
    assert coloured == "\033[90ma\033[0m\033[37m↵\n\033[0m\033[30;42mb\033[0m\033[30;102m c\033[0m"
    assert render_labels(tokenizer, ids, ids, color=False) == "[[a|↵\n|b| c]]"
    assert render_labels(tokenizer, ids[:1], [-100], color=False) == "a"
    escape = tokenizer("\033[2J")["input_ids"]
    assert "\033" not in render_labels(tokenizer, escape, escape, color=False)


def test_examples_are_told_and_shown(model, tmp_path, capsys):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages, "id": n} for n in range(5)])
    config = load_data_of_model(str(model), str(path))
    print(*show_data(config.model, config.data, examples=2), sep="\n")
    out = capsys.readouterr().out
    assert f"{path}: 5 rows, chat messages (messages; not read: id)" in out
    assert "template: the tokenizer's chat template; loss on " in out
    assert "; would pack into 1 rows of 2,048 tokens, " in out and "(training.packing is false; bins packs" in out
    assert out.count("\nexample ") == 2 and "[[" in out and "<|im_end|>|↵\n]]" in out


def test_long_examples_are_cut_for_the_terminal(model, tmp_path, capsys):
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "one two three " * 300}])
    config = load_data_of_model(str(model), str(path), ["data.max_length=1000"])
    print(*show_data(config.model, config.data), sep="\n")
    out = capsys.readouterr().out
    assert "example 0 (00000000-" in out and "1,000 tokens, 999 with a loss" in out
    assert "... 600 more tokens, 600 with a loss" in out and "template: none (text as it is)" in out


def test_errors_come_as_from_training(model, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    config = load_data_of_model(str(model), str(path))
    with pytest.raises(UserError, match="preference pairs"):
        print(*show_data(config.model, config.data), sep="\n")
    with pytest.raises(UserError, match="data.maxlength: unknown key.*did you mean"):
        load_data_of_model(str(model), str(path), ["data.maxlength=3"])


def test_paths_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "data[1]").mkdir()
    for local in ("folder", "data[1]", "missing.jsonl", "./missing", "~/missing", "/missing"):
        assert recognised_data(local)["sources"] == [{"path": local, "kind": "auto"}]
    assert recognised_data("user/set")["sources"] == [{"name": "user/set", "kind": "auto"}]


def test_no_weights_are_downloaded(monkeypatch, model):
    asked = {}

    def download(name, revision, allow_patterns):
        asked[name] = allow_patterns
        return str(model)

    monkeypatch.setattr("tokenseek.models.files.snapshot_download", download)
    from tokenseek.config import ModelConfig
    from tokenseek.models.loading import load_tokenizer

    load_tokenizer(ModelConfig(name_or_path="user/a"), weights=False)
    load_tokenizer(ModelConfig(name_or_path="user/b"))
    assert "*.safetensors" not in asked["user/a"] and set(asked["user/b"]) == {*asked["user/a"], "*.safetensors"}


def test_the_command(model, tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    assert cli.main(["data", "--model", str(model), "--data", str(path), "--set", "data.template=plain"]) == 0
    out = capsys.readouterr().out
    assert "instruction and response (instruction from 'question', response from 'answer')" in out
    assert "template: plain (data.template)" in out and "↵\n|↵\n[[2|</s>]]" in out
    preset = tmp_path / "preset.yaml"
    source = f"{{path: {path}, columns: {{instruction: question, response: answer}}}}"
    preset.write_text(f"model: {{name_or_path: {model}}}\ndata: {{sources: [{source}]}}\noutput_dir: x\n")
    assert cli.main(["data", "--preset", str(preset), "--examples", "1", "--set", "training.packing=bins"]) == 0
    out = capsys.readouterr().out
    assert "template: alpaca (data.template)" in out and "; packed into 1 rows of " in out
    for words in (["--model", "x"], ["--data", "x"], [], ["--preset", "gsm8k", "--data", "x"]):
        assert cli.main(["data", *words]) == 2
        assert "give --model and --data, or a --preset" in capsys.readouterr().err
    assert cli.main(["data", "--model", str(model), "--data", "missing.jsonl"]) == 2
    assert "data.sources.0.path: no file or folder 'missing.jsonl'" in capsys.readouterr().err
