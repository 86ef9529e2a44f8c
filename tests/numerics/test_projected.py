"""Where they are smaller, hidden states are kept for the backward pass and projected to keys and values again."""

from __future__ import annotations

import peft
import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import SELECTED, assert_same, copied, gradients, make_batch
from tiny_models import computed_in, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import tokenseek
from benchmarks.memory import LiveStorages
from tokenseek.ditching.projected import ProjectedAgain


@pytest.fixture
def used(monkeypatch):
    """For each layer of a step, whether it kept its hidden states."""
    made, keep = [], ProjectedAgain.keep_instead_of

    def noted(self, *given):
        made.append(keep(self, *given))
        return made[-1]

    monkeypatch.setattr(ProjectedAgain, "keep_instead_of", noted)
    return made


@pytest.mark.parametrize("kind, is_smaller", [("gpt2", True), ("llama", False)])
@pytest.mark.parametrize("options", [{}, dict(kv_storage="host"), dict(tile_rows=3)], ids=str)
def test_it_is_exact(kind, is_smaller, options, used, exact_softmax):
    model = tiny_model(kind, dtype=torch.float64)
    tokenseek.enable_token_ditching(model, recompute=True, **options)
    assert_same(model, make_batch(), SELECTED, computed_in(kind))
    assert used == [is_smaller] * 4


@pytest.mark.parametrize("tile_rows", [3, 100])
def test_dropout_drops_the_same(tile_rows, monkeypatch):
    model = tiny_model("gpt2", dtype=torch.float64)
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.5, fan_in_fan_out=True)
    model = peft.get_peft_model(model, settings).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tokenseek.enable_token_ditching(model, recompute=True, tile_rows=tile_rows)
    found = []
    for projects in (True, False):
        if not projects:
            monkeypatch.setattr(ProjectedAgain, "keep_instead_of", lambda self, *given: False)
        torch.manual_seed(1)
        found.append(copied(gradients(model, model(**make_batch(), selected_positions=SELECTED).loss)))
    assert_close(*found)


def test_it_needs_half_the_memory_of_keys_and_values(monkeypatch):
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    ids, peaks = torch.arange(1, 513)[None] % 64, []
    for projects in (True, False):
        if not projects:
            monkeypatch.setattr(ProjectedAgain, "keep_instead_of", lambda self, *given: False)
        tokenseek.enable_token_ditching(model, recompute=True)
        with LiveStorages().ignore(model.parameters()) as live:
            model(input_ids=ids, labels=ids, selected_positions=torch.arange(31, 512, 32)[None]).loss.backward()
        model.zero_grad()
        peaks.append(live.peak)
    of_a_layer = 496 * 64 * 4
    assert peaks[0] < peaks[1] - 6 * of_a_layer
