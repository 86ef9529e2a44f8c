"""LoRA on weights in 4 and 8 bits: the gradients of token ditching are those of the dequantised weights."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close, errors
from numerics.dense_reference import dense_loss
from numerics.test_ditching import SELECTED, gradients, make_batch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tokenseek
from tokenseek import SelectionRule
from tokenseek.config import ModelConfig, PeftSettings
from tokenseek.ditching import Seeking
from tokenseek.models.adapters import add_adapter
from tokenseek.models.loading import load_model

pytest.importorskip("bitsandbytes")

LORA = PeftSettings(method="lora", r=4, target_modules="all-linear", extra={"init_lora_weights": False})
QUANTIZATIONS = {
    "nf4-double": {"quantization": "nf4", "double_quantization": True},
    "nf4": {"quantization": "nf4"},
    "fp4": {"quantization": "fp4"},
    "int8": {"quantization": "int8"},
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where GPUs are, `load_model` puts quantised weights there."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def with_lora(model):
    torch.manual_seed(0)
    return add_adapter(model, LORA).train()


def evaluate(model):
    model.eval()
    with torch.no_grad():
        loss = model(**make_batch()).loss
    model.train()
    return loss


@pytest.mark.parametrize("evaluated", ["never", "before", "between"])
@pytest.mark.parametrize("options", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_gradients_are_those_of_the_dequantised_weights(folder, options, evaluated):
    """Evaluation makes bitsandbytes repack 4-bit weights on some CPUs, into a form without a backward pass."""
    loaded = load_model(ModelConfig(name_or_path=str(folder), dtype="float32", **options))
    truth = with_lora(copy.deepcopy(loaded).dequantize())
    model = with_lora(loaded)
    if evaluated == "before":
        evaluate(model)
    tokenseek.enable_token_ditching(model)
    if evaluated == "between":
        evaluate(model)
    expected_loss = dense_loss(truth, **make_batch(), selected_positions=SELECTED)
    loss = model(**make_batch(), selected_positions=SELECTED).loss
    assert_close(loss, expected_loss)
    assert_close(gradients(model, loss), gradients(truth, expected_loss))


@pytest.mark.parametrize("exact_layers", [0, 1])
@pytest.mark.parametrize("options", [QUANTIZATIONS["nf4-double"], QUANTIZATIONS["int8"]], ids=["nf4-double", "int8"])
def test_steps_that_select_their_own_tokens(folder, options, exact_layers):
    loaded = load_model(ModelConfig(name_or_path=str(folder), dtype="float32", **options))
    truth = with_lora(copy.deepcopy(loaded).dequantize())
    model = with_lora(loaded)
    tokenseek.enable_token_ditching(model, seeking=Seeking("l2", exact_layers=exact_layers))
    rule = SelectionRule("sampled", ratio=0.4, alpha=0, beta=1, explore=0.3)
    output = model(**make_batch(), selection=rule, selection_keys=torch.tensor([1, 2]))
    expected_loss = dense_loss(
        truth,
        **make_batch(),
        selected_positions=output.selected_positions,
        selected_weights=output.selected_weights,
        num_items_in_batch=make_batch()["labels"][:, 1:].ne(-100).sum(),
        exact_layers=exact_layers,
    )
    assert_close(output.loss, expected_loss)
    assert_close(gradients(model, output.loss), gradients(truth, expected_loss))


def test_weights_of_another_loader_are_made_trainable(folder):
    """From `from_pretrained` and evaluated before ditching: what was repacked is unpacked, to the scales' last bits."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    truth = with_lora(copy.deepcopy(loaded).dequantize())
    model = with_lora(loaded)
    evaluate(model)
    tokenseek.enable_token_ditching(model)
    evaluate(model)
    expected = gradients(truth, dense_loss(truth, **make_batch(), selected_positions=SELECTED))
    actual = gradients(model, model(**make_batch(), selected_positions=SELECTED).loss)
    assert max(errors(actual, expected).values()) < 0.1


@pytest.mark.parametrize("options", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_training_lowers_the_loss_and_leaves_the_weights_alone(folder, options):
    model = with_lora(load_model(ModelConfig(name_or_path=str(folder), dtype="bfloat16", **options)))
    tokenseek.enable_token_ditching(model)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(**make_batch(), selected_positions=SELECTED).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        evaluate(model)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
