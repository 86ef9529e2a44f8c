"""`tokenseek chat` and a finished model on the hub, on a tiny run and without a network."""

import builtins

import pytest
import torch
from helpers import CHAT_TEMPLATE
from tiny_preset import tiny_preset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenseek.cli import main
from tokenseek.errors import UserError
from tokenseek.runs.chat import Conversation
from tokenseek.runs.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    train(tiny_preset(folder, "selection.rule=random", "data.template=plain"))
    return folder


def expected_answer(folder, prompt, adds_special_tokens=True):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=adds_special_tokens)["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_run_answers_in_the_template_that_it_was_trained_with(folder, capsys):
    words = ["--prompt", "Add 1 and 2.", "--max-new-tokens", "6", "--temperature", "0", "--set", "model.dtype=float32"]
    assert main(["chat", str(folder / "run"), *words]) == 0
    assert (
        capsys.readouterr().out.rstrip("\n") == expected_answer(folder / "run" / "final", "Add 1 and 2.\n\n").rstrip()
    )


def test_a_model_answers_in_its_chat_template_and_remembers(folder, capsys, monkeypatch):
    typed = iter(["Hello", "", "And?", "/new", "Hello", "/exit"])
    asked = []
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    ids = Conversation._ids
    monkeypatch.setattr(Conversation, "_ids", lambda self, text: asked.append(ids(self, text)) or asked[-1])
    words = ["--max-new-tokens", "6", "--temperature", "0", "--system", "Be brief.", "--set", "model.dtype=float32"]
    assert main(["chat", str(folder / "model"), *words]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    first, second, third = (tokenizer.decode(prompt[0]) for prompt in asked)
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert first == third == start
    assert second.startswith(start) and second.endswith("user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    assert "template: chat" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,message",
    [
        (["no/such/model"], "there is no folder no/such/model"),
        (["RUN", "--prompt", " "], "--prompt is empty"),
        (["RUN", "--system", "Be brief."], "--system is for the template chat, and this is plain"),
        (["BARE", "--template", "chat"], "the tokenizer has no chat template; give --template none"),
        (["BARE", "--adapter", "BARE"], "the folder holds no adapter_config.json"),
    ],
)
def test_what_cannot_be_talked_to_is_told(words, message, folder, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = {"RUN": str(folder / "run"), "BARE": str(tmp_path)}
    assert main(["chat", *(names.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("given", ["-1", "warm", "inf"])
def test_no_temperature(given, capsys):
    with pytest.raises(SystemExit):
        main(["chat", "x", "--temperature", given])
    assert f"'{given}' is not a temperature" in capsys.readouterr().err


class Hub:
    """What is asked of the hub."""

    def __init__(self):
        self.made, self.files = [], {}

    def create_repo(self, name, exist_ok):
        self.made.append(name)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
        assert self.made == [repo_id]
        self.files[path_in_repo] = path_or_fileobj.read_text()

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        assert self.made == [repo_id]
        self.files |= {path.name: path for path in folder_path.iterdir()}
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("tokenseek.runs.hub.HfApi", lambda: hub)
    monkeypatch.setattr("tokenseek.runs.hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tokenseek.runs.hub.get_token", lambda: "hf_of_a_test")
    return hub


TO_HUB = ["selection.rule=random", "training.push_to_hub=true", "training.hub_model_id=me/mine"]


def test_a_finished_model_is_uploaded_with_its_card(hub, tmp_path, caplog):
    caplog.set_level("INFO", "tokenseek")
    train(tiny_preset(tmp_path, *TO_HUB))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= set(hub.files)
    assert "rule: random" in hub.files["tokenseek.yaml"]
    assert "library_name: peft" in hub.files["README.md"].read_text()
    assert not [name for name in hub.files if name.endswith((".bin", ".pt", ".pth"))]
    assert "on the hub: https://huggingface.co/me/mine" in caplog.text


def test_an_upload_that_fails_says_where_the_model_is(hub, tmp_path, monkeypatch):
    def fail(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "upload_folder", fail)
    with pytest.raises(UserError, match="me/mine could not be uploaded .no route to host.*`hf upload me/mine "):
        train(tiny_preset(tmp_path, *TO_HUB))
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "broken,message",
    [
        ("offline", "HF_HUB_OFFLINE is set"),
        ("nobody", "nobody is logged in; run `hf auth login`"),
        ("forbidden", "hub_model_id: 'me/mine' cannot be made on the hub: 403"),
    ],
)
def test_a_hub_that_cannot_be_written_to_is_told_before_training(broken, message, hub, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise OSError("403 Forbidden")

    if broken == "offline":
        monkeypatch.setattr("tokenseek.runs.hub.constants.HF_HUB_OFFLINE", True)
    elif broken == "nobody":
        monkeypatch.setattr("tokenseek.runs.hub.get_token", lambda: None)
    else:
        monkeypatch.setattr(hub, "create_repo", forbidden)
    monkeypatch.setattr("tokenseek.runs.train.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=message):
        train(tiny_preset(tmp_path, *TO_HUB))


@pytest.mark.parametrize(
    "setting,message",
    [
        ("training.push_to_hub=true", "push_to_hub needs hub_model_id"),
        ("training.hub_model_id=me/mine", "hub_model_id is for push_to_hub: true"),
    ],
)
def test_half_of_the_settings(setting, message, folder):
    with pytest.raises(UserError, match=message):
        tiny_preset(folder, setting)
