"""What a run leaves is whole: merged models, adapters that reload to the same model, names that others can resolve.

The numbers in the ids are the rows of the table of situations that each test asserts the right value of.
"""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from helpers import tiny_tokenizer
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny_models import tiny_model
from tiny_preset import tiny_preset
from transformers import AutoModelForCausalLM

from tokenseek.cli import main
from tokenseek.config import PeftSettings
from tokenseek.errors import UserError
from tokenseek.models.checks import require_adapter
from tokenseek.models.portable import require_portable
from tokenseek.runs.export import merge_adapter
from tokenseek.runs.train import train

IDS = torch.tensor([[5, 17, 3, 80, 44, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_model("llama_tied").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapter_on(base, folder, **settings):
    """A trained adapter's folder and the logits of the model with it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return folder, adapted(input_ids=IDS).logits


@pytest.mark.parametrize(
    "settings,tied",
    [
        pytest.param({"target_modules": ["lm_head"]}, False, id="18-head"),
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, False, id="18-head-and-others"),
        pytest.param({"target_modules": ["embed_tokens"]}, False, id="18-embeddings"),
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False, id="18-head-trained-whole"),
        pytest.param({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, True, id="18-tokens"),
        pytest.param({"target_modules": ["q_proj"]}, True, id="18-neither"),
    ],
)
def test_a_merged_model_computes_what_the_adapter_did(settings, tied, base, tmp_path):
    adapter, logits = adapter_on(base, tmp_path / "adapter", **settings)
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits
    assert (plain - logits).abs().max() > 0.1


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return adapter_on(base, tmp_path_factory.mktemp("adapter") / "adapter", target_modules=["q_proj"])[0]


def moved(folder):
    return ["--base", str(folder / "nowhere")], "--base: the base model .*nowhere.* is not available"


def other_shape(folder):
    tiny_model("llama", hidden_size=16).save_pretrained(folder / "other")
    return ["--base", str(folder / "other")], "--base: .* does not fit the base model"


def without_weights(folder):
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text("{}")
    return ["--base", str(folder / "bare")], "--base: .*holds no .*safetensors"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(moved, id="21-moved"),
        pytest.param(other_shape, id="21-other-shape"),
        pytest.param(without_weights, id="21-no-weights"),
    ],
)
def test_a_base_that_does_not_serve_is_named(case, adapter, tmp_path, capsys):
    arguments, message = case(tmp_path)
    assert main(["merge-adapter", str(adapter), str(tmp_path / "merged"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "merged").exists()


def test_a_base_that_moved_since_the_adapter_was_saved(base, tmp_path):
    shutil.copytree(base, tmp_path / "here")
    adapter, _ = adapter_on(tmp_path / "here", tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(UserError, match="--base: the base model '.*here' of .*adapter is not available"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "there"))
    assert (tmp_path / "merged" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("below", ["", "folder"], ids=["21-file", "21-below-a-file"])
def test_an_output_that_is_a_file_is_named(below, adapter, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert main(["merge-adapter", str(adapter), str(tmp_path / "taken" / below)]) == 2
    assert f"output: {tmp_path / 'taken'} is a file, not a folder" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    "method,extra,message",
    [
        pytest.param("lora", {"init_lora_weights": "pissa_niter_4"}, "changes the weights of the base", id="19-niter"),
        pytest.param("lora", {"init_lora_weights": "pissa"}, "changes the weights of the base", id="19-pissa"),
        pytest.param("lora", {"init_lora_weights": "olora"}, "changes the weights of the base", id="19-olora"),
        pytest.param("lora", {"init_lora_weights": "corda"}, "cannot start with .*corda", id="19-needs-data"),
        pytest.param("lora", {"init_lora_weights": "pizza"}, "cannot start with .*pizza", id="19-unknown"),
    ],
)
def test_an_adapter_that_would_reload_to_another_model_is_refused(method, extra, message):
    with pytest.raises(UserError, match=f"peft: {method} .*{message}"):
        require_adapter(tiny_model("llama"), PeftSettings(method=method, r=4, extra=extra))


@pytest.mark.parametrize(
    "method,options",
    [
        ("lora", {"r": 4}),
        ("lora", {"r": 4, "extra": {"init_lora_weights": "gaussian"}}),
        ("lora", {"r": 4, "extra": {"init_lora_weights": "orthogonal"}}),
        ("lora", {"r": 4, "extra": {"init_lora_weights": False, "use_dora": True}}),
        ("lora", {"r": 4, "target_modules": ["embed_tokens"]}),
        ("loha", {"r": 4}),
        ("lokr", {"r": 4}),
        ("ia3", {}),
        ("oft", {"extra": {"oft_block_size": 8}}),
        ("boft", {}),
        ("vera", {"r": 4}),
        ("randlora", {"r": 4}),
        ("fourierft", {"extra": {"n_frequency": 20}}),
    ],
)
def test_an_adapter_that_reloads_to_itself_is_accepted(method, options):
    settings = PeftSettings(method=method, **options)
    adapted = require_adapter(tiny_model("llama"), settings)
    state = torch.get_rng_state()
    require_portable(adapted, settings)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """A configuration whose model is `me/tiny` of a hub, of which this machine has a snapshot of commit 1234...."""
    config, commit = tiny_preset(tmp_path, "selection.rule=random"), "1234" * 10
    cached = tmp_path / "hub" / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(tmp_path / "model", cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": "me/tiny"})})


def test_row_20_an_adapter_names_its_base_as_the_hub_does(on_the_hub, tmp_path):
    train(on_the_hub)
    settings = PeftConfig.from_pretrained(tmp_path / "run" / "final")
    assert (settings.base_model_name_or_path, settings.revision) == ("me/tiny", "1234" * 10)
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "\nbase_model: me/tiny\n" in card and f"`me/tiny` at revision `{'1234' * 10}`" in card
    merge_adapter(tmp_path / "run" / "final", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_an_adapter_names_a_folder_by_its_whole_path(tmp_path, monkeypatch):
    config = tiny_preset(tmp_path, "selection.rule=random")
    monkeypatch.chdir(tmp_path)
    train(config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": "model"})}))
    settings = PeftConfig.from_pretrained(tmp_path / "run" / "final")
    assert (settings.base_model_name_or_path, settings.revision) == (str((tmp_path / "model").resolve()), None)
    assert "base_model:" not in (tmp_path / "run" / "final" / "README.md").read_text()
