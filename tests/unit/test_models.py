"""Models by configuration: their fingerprint, and folders that hold no model."""

import json
import shutil

import pytest
import torch
from helpers import tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from tokenseek import UserError
from tokenseek.config import ModelConfig
from tokenseek.models.files import fingerprint_model, model_folder
from tokenseek.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_fingerprint_does_not_depend_on_the_split_into_files(folder, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) == 1 < len(list(tmp_path.glob("*.safetensors")))
    assert fingerprint_model(tmp_path) == fingerprint_model(folder)


def test_the_fingerprint_is_that_of_a_loaded_and_saved_model(folder, tmp_path):
    load_model(ModelConfig(name_or_path=str(folder), dtype="float32")).save_pretrained(tmp_path)
    assert fingerprint_model(tmp_path) == fingerprint_model(folder)


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_one_weight_changes_the_fingerprint(copy, folder, tensor):
    tensors = load_file(copy / "model.safetensors")
    tensors[tensor].view(-1)[7] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_model(copy) != fingerprint_model(folder)


@pytest.mark.parametrize("seed", [0, 1])
def test_other_weights_change_the_fingerprint(seed, folder, tmp_path):
    tiny_model("llama", seed=seed).save_pretrained(tmp_path)
    assert (fingerprint_model(tmp_path) == fingerprint_model(folder)) == (seed == 0)


def test_another_type_of_number_changes_the_fingerprint(folder, tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert fingerprint_model(tmp_path) != fingerprint_model(folder)


@pytest.mark.parametrize(
    "values,same",
    [
        ({"rms_norm_eps": 1e-5}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, False),
        ({"use_cache": False, "transformers_version": "5.99", "_name_or_path": "elsewhere"}, True),
    ],
)
def test_the_fingerprint_covers_what_the_model_computes(copy, folder, values, same):
    edit_config(copy, **values)
    assert (fingerprint_model(copy) == fingerprint_model(folder)) == same


def test_a_folder_without_safetensors(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \*.safetensors weights. Convert them once"):
        fingerprint_model(copy)


@pytest.mark.parametrize("keep", [4, 100, -1], ids=["no-header", "half-a-header", "one-byte-short"])
def test_a_truncated_file_of_weights(copy, keep):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        fingerprint_model(copy)


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/no-such-model", "a/b/c"])
def test_a_folder_that_does_not_exist(name):
    with pytest.raises(UserError, match="model.name_or_path: there is no folder .*give an existing folder or a name"):
        model_folder(ModelConfig(name_or_path=name))


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(UserError, match="holds no config.json; give a folder written by save_pretrained"):
        model_folder(ModelConfig(name_or_path=str(tmp_path)))


def test_a_name_that_cannot_be_had_from_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/no-model' is no folder here and cannot be fetched.*HF_HUB_OFFLINE=1"):
        model_folder(ModelConfig(name_or_path="nobody/no-model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_is_loaded_as_configured(folder, dtype, attention):
    model = load_model(ModelConfig(name_or_path=str(folder), dtype=dtype, attn_implementation=attention))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == attention


def test_a_folder_without_a_tokenizer(folder):
    with pytest.raises(UserError, match="holds no tokenizer.*tokenizer.save_pretrained"):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))


def test_a_tokenizer_without_padding_pads_with_its_end_of_sequence(copy):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    loaded = load_tokenizer(ModelConfig(name_or_path=str(copy)))
    assert loaded.pad_token_id == loaded.eos_token_id is not None
