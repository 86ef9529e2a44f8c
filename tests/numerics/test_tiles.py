"""Unselected rows in tiles: losses and gradients are those of Algorithm 1 computed densely, and memory is a tile's."""

from __future__ import annotations

import pytest
import torch
from numerics.test_ditching import SELECTED, assert_same, make_batch
from tiny_models import EAGER_ONLY, KINDS, computed_in, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import tokenseek
from benchmarks import long_context
from benchmarks.memory import LiveStorages
from tokenseek.errors import UserError


@pytest.mark.parametrize(
    "kind,attn", [(k, a) for k in KINDS for a in ("sdpa", "eager") if a == "eager" or k not in EAGER_ONLY]
)
def test_every_architecture(kind, attn, exact_softmax):
    model = tokenseek.enable_token_ditching(tiny_model(kind, attn=attn, dtype=torch.float64), tile_rows=6)
    expected = assert_same(model, make_batch(), SELECTED, computed_in(kind))
    assert sum(g.norm() > 0 for g in expected.values() if g is not None) > 10


@pytest.mark.parametrize("rows", [1, 3, 7, "auto"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("options", [{}, dict(recompute=True), dict(recompute=True, kv_storage="host")], ids=str)
def test_every_size(rows, left, options, exact_softmax):
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64), tile_rows=rows, **options)
    batch = make_batch(left=left)
    selected = torch.tensor([[3, 4, 8, 12], [6, 9, -1, -1]]) if left else SELECTED
    assert_same(model, batch, selected, computed_in("llama"))
    alone = {name: tensor[:1] for name, tensor in batch.items() if name != "attention_mask"}
    assert_same(model, alone, torch.tensor([[0, 5, 10]]), computed_in("llama"))


def test_a_layer_holds_one_tile():
    """Peak of a step without the model's states, most of it in the feed-forward layer of the unselected rows."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=64, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    ids = torch.arange(1, 1025)[None] % 64
    peaks = {}
    for rows in (10**9, 128):
        tokenseek.enable_token_ditching(model, recompute=True, tile_rows=rows)
        with LiveStorages().ignore(model.parameters()) as live:
            model(input_ids=ids, labels=ids, selected_positions=torch.arange(31, 1024, 32)[None]).loss.backward()
        model.zero_grad()
        peaks[rows] = live.peak
    of_all_rows = 3 * 992 * 1024 * 4  # gate, up and their product
    assert peaks[10**9] > of_all_rows
    assert peaks[128] < peaks[10**9] - 0.8 * of_all_rows


def test_one_mask_at_a_time():
    """All tiles' masks together are as long as the text, and would here be most of a step's memory."""
    sizes = dict(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    tokenseek.enable_token_ditching(model, recompute=True, tile_rows=512)
    tokens = 4096
    ids = torch.arange(tokens)[None] % 64
    with LiveStorages().ignore(model.parameters()) as live:
        model(input_ids=ids, labels=ids, selected_positions=torch.arange(31, tokens, 32)[None]).loss.backward()
    mask = 512 * 544 * 4
    assert mask < live.peak < 6 * mask, "eight would be all"


def test_a_long_step_takes_what_is_planned():
    """Ten tiles and more: what is kept for each of them would be missing from the plan, which runs a few."""
    name = "tokenseek@0.1+recompute+lora"
    peak, _ = long_context.measured(name, long_context.SHAPE, 8192)
    assert peak == pytest.approx(long_context.planned(long_context.METHODS[name], long_context.SHAPE, 8192), rel=0.03)


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "all"])
def test_bad_sizes_are_refused(rows):
    with pytest.raises(UserError, match=r"tile_rows is .*must be 'auto' or a number of rows, at least 1"):
        tokenseek.enable_token_ditching(tiny_model("llama"), tile_rows=rows)
