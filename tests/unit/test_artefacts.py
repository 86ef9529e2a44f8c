"""What a run leaves is whole: merged models, adapters that reload to the same model, names that others can resolve.

The numbers in the ids are the rows of the table of situations that each test asserts the right value of.
"""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from helpers import tiny_tokenizer
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from tokenseek.cli import main
from tokenseek.errors import UserError
from tokenseek.runs.export import merge_adapter

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
