"""Passes over all tokens without gradient in tiles: what they give is what it is at once, and memory is a tile's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import make_batch
from numerics.test_hybrids import batch as batch_of_hybrids
from numerics.test_online import DRAWN, KEYS, assert_same
from tiny_models import EAGER_ONLY, HYBRIDS, KINDS, computed_in, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import tokenseek
from benchmarks.memory import LiveStorages
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import Seeking
from tokenseek.errors import UserError
from tokenseek.seeking import TokenScorer
from tokenseek.tiling.tiles import TiledLayer
from tokenseek.training.evaluating import loss_in_pieces

EVERY = [(k, a) for k in KINDS for a in ("sdpa", "eager") if a == "eager" or k not in EAGER_ONLY]


@pytest.fixture
def in_tiles(monkeypatch):
    """The layers that ran in tiles."""
    seen, finish = [], TiledLayer.finish
    monkeypatch.setattr(TiledLayer, "finish", lambda self, *given: seen.append(self.layer) or finish(self, *given))
    return seen


@pytest.mark.parametrize("gradient_layer", [1, 2])
@pytest.mark.parametrize("kind,attn", [*EVERY, *((kind, "sdpa") for kind in HYBRIDS)])
def test_scores(kind, attn, gradient_layer, in_tiles):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    batch = make_batch() if kind not in HYBRIDS else batch_of_hybrids()
    batch.pop("selected_positions", None)
    expected = TokenScorer(model, gradient_layer=gradient_layer).score(**batch)
    assert not in_tiles
    actual = TokenScorer(model, gradient_layer=gradient_layer, tile_rows=5).score(**batch)
    assert_close(actual._asdict(), expected._asdict())
    decoder = find_decoder(model)
    attending = [layer for layer in decoder.layers if layer not in decoder.mixers][:-1]
    assert in_tiles == [layer for layer in decoder.layers[:-gradient_layer] if layer in attending]


@pytest.mark.parametrize("exact_layers", [0, 1])
@pytest.mark.parametrize("kind,attn", EVERY)
def test_steps_that_select(kind, attn, exact_layers, in_tiles):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    tokenseek.enable_token_ditching(model, seeking=Seeking("l2", exact_layers=exact_layers), tile_rows=4)
    assert_same(model, make_batch(), computed_in=computed_in(kind, attn), exact_layers=exact_layers)
    assert len(in_tiles) == len(find_decoder(model).layers) - 1 * (exact_layers or 1)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_steps_of_hybrids_that_select(kind, in_tiles):
    options = dict(seeking=Seeking("error"))
    batch = batch_of_hybrids()
    batch.pop("selected_positions")
    losses = []
    for rows in ("auto", 4):
        model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64), tile_rows=rows, **options)
        output = model(**batch, selection=DRAWN, selection_keys=torch.arange(len(batch["input_ids"])))
        output.loss.backward()
        losses.append([output.loss, output.loss_all, *(p.grad for p in model.parameters())])
    assert in_tiles
    assert_close(losses[1], losses[0], computed_in(kind))


@pytest.mark.parametrize("rule", ["left", "storage", "error"])
def test_steps_that_select_of_other_kinds(rule, in_tiles):
    batch = make_batch(left=rule == "left")
    if rule == "left":
        batch["labels"].scatter_(1, batch["attention_mask"].argmax(1, keepdim=True), -100)
    storage = dict(recompute=True, kv_storage="host") if rule == "storage" else {}
    seeking = Seeking("error" if rule == "error" else "l2")
    model = tiny_model("llama", dtype=torch.float64)
    assert_same(tokenseek.enable_token_ditching(model, seeking=seeking, tile_rows=1, **storage), batch)
    assert in_tiles


@pytest.mark.parametrize("ditched", [False, True])
@pytest.mark.parametrize("kind,attn", [*EVERY, *((kind, "sdpa") for kind in HYBRIDS)])
def test_evaluation(kind, attn, ditched, in_tiles, monkeypatch):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    if ditched:
        tokenseek.enable_token_ditching(model, tile_rows=4)
    else:
        monkeypatch.setattr("tokenseek.tiling.tiles.AUTO_ROWS", 6)
    batch = make_batch()
    forward = model.forward
    with torch.no_grad():
        for items in ({}, dict(num_items_in_batch=7)):
            expected = model(**batch, **items, use_cache=False)
            assert not in_tiles
            with loss_in_pieces(model, batch["labels"].shape, nullcontext):
                actual = model(**batch, **items, use_cache=False)
            assert_close(actual.loss, expected.loss, torch.float32)  # in which Transformers takes its own
            assert actual.logits is None and in_tiles
            in_tiles.clear()
    assert model.forward == forward


def test_who_asks_for_all_hidden_states_gets_them(in_tiles):
    model = tiny_model("llama", output_hidden_states=True)
    ids = make_batch()["input_ids"]
    with torch.no_grad(), loss_in_pieces(tokenseek.enable_token_ditching(model, tile_rows=2), ids.shape, nullcontext):
        assert len(model(input_ids=ids, labels=ids).hidden_states) == 5
    assert not in_tiles


def long_model():
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=64, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    return model.requires_grad_(False), torch.arange(1, 1025)[None] % 64


OF_ALL_ROWS = 3 * 1024 * 1024 * 4  # gate, up and their product


def peak(model, run) -> int:
    with LiveStorages().ignore(model.parameters()) as live:
        run()
    return live.peak


def test_scoring_holds_one_tile_below_the_gradient_layer():
    model, ids = long_model()
    decoder = find_decoder(model)
    peaks = []
    for rows in (10**9, 128):
        reached = []
        with LiveStorages().ignore(model.parameters()) as live:
            hook = decoder.layers[-1].register_forward_pre_hook(lambda *_, live=live, to=reached: to.append(live.peak))
            TokenScorer(model, tile_rows=rows).score(ids, torch.ones_like(ids), ids)
            hook.remove()
        peaks.append(reached[0])
    assert peaks[0] > OF_ALL_ROWS and peaks[1] < peaks[0] - 0.8 * OF_ALL_ROWS


def test_the_first_pass_of_a_step_holds_one_tile():
    model, ids = long_model()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    peaks = []
    for rows in (10**9, 128):
        tokenseek.enable_token_ditching(model, recompute=True, tile_rows=rows, seeking=Seeking("error"))
        rule = tokenseek.SelectionRule("random", ratio=1 / 32)
        arguments = dict(input_ids=ids, labels=ids, selection=rule, selection_keys=KEYS[:1])
        peaks.append(peak(model, lambda arguments=arguments: model(**arguments).loss.backward()))
        model.zero_grad()
    assert peaks[0] > OF_ALL_ROWS and peaks[1] < peaks[0] - 0.8 * OF_ALL_ROWS


def test_evaluation_holds_one_tile_and_no_logits_of_all_rows():
    model, ids = long_model()
    tokenseek.enable_token_ditching(model, tile_rows=128)

    @torch.no_grad()
    def run(in_pieces):
        with loss_in_pieces(model, ids.shape, nullcontext) if in_pieces else nullcontext():
            model(input_ids=ids, labels=ids, use_cache=False)

    peaks = [peak(model, lambda way=way: run(way)) for way in (False, True)]
    assert peaks[0] > OF_ALL_ROWS and peaks[1] < peaks[0] - 0.8 * OF_ALL_ROWS


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="tile_rows is 0; it must be 'auto' or a number of rows, at least 1"):
        TokenScorer(tiny_model("llama"), tile_rows=0)
