"""Layers in which tokens look at a window: no mask of all rows and keys, and no keys and values that nobody sees."""

from __future__ import annotations

from functools import wraps
from unittest import mock

import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import assert_same, make_batch
from numerics.test_hybrids import batch as batch_of_hybrids
from numerics.test_online import DRAWN, KEYS
from numerics.test_online import assert_same as assert_same_online
from numerics.test_packing import assert_same as assert_same_packed
from numerics.test_packing import examples
from tiny_models import computed_in, tiny_model
from transformers import masking_utils

import tokenseek
from tokenseek import SelectionRule
from tokenseek.decoder.find import find_decoder
from tokenseek.decoder.masks import SlidingWindow, whole_masks
from tokenseek.ditching import Seeking, attention
from tokenseek.ditching.storage import copies_watched
from tokenseek.seeking import TokenScorer
from tokenseek.tiling import staircase

WINDOW = 5  # of the tiny models
STORED = [{}, dict(recompute=True), dict(recompute=True, kv_storage="host"), dict(kv_storage="host")]
# Together at the end, as of a response: those of a window are few.
AT_END = torch.tensor([[97, 98, 100, 103]])


@pytest.fixture
def masks_made(monkeypatch):
    """Masks of all rows and keys that Transformers makes."""
    made, make = [], masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    @wraps(make)
    def noted(*args, **kwargs):
        mask = make(*args, **kwargs)
        made.extend([] if mask is None else [mask])
        return mask

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", noted)
    return made


@pytest.mark.parametrize("selected", [AT_END, torch.arange(3, 104, 4)[None], torch.arange(1, 104)[None]], ids=len)
@pytest.mark.parametrize("tile_rows", ["auto", 7])
@pytest.mark.parametrize("options", STORED, ids=str)
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_without_masks(kind, options, tile_rows, selected, exact_softmax):
    model = tiny_model(kind, dtype=torch.float64)
    tokenseek.enable_token_ditching(model, tile_rows=tile_rows, **options)
    batch = make_batch((104,))
    spans, dense = attention.make_window_spans, "tokenseek.tiling.rows.Rows.window_mask"
    with (
        mock.patch.object(attention, "make_window_spans", wraps=spans) as used,
        mock.patch(dense, side_effect=AssertionError),
    ):
        assert_same(model, batch, selected, computed_in(kind))
    assert used.call_count


def test_no_mask_of_all_rows_and_keys_is_made(masks_made):
    model = tokenseek.enable_token_ditching(tiny_model("mistral"))
    model(**make_batch((104, 90)), selected_positions=torch.tensor([[50, 97], [3, 89]])).loss.backward()
    assert not masks_made


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_batches(left):
    batch = make_batch((40, 25), left=left)
    selected = torch.tensor([[3, 30, 39], [20, 21, 38]] if left else [[3, 30, 39], [0, 24, -1]])
    for options in STORED:
        model = tokenseek.enable_token_ditching(tiny_model("mistral", dtype=torch.float64), tile_rows=6, **options)
        assert_same(model, batch, selected)


@pytest.mark.parametrize("tile_rows", ["auto", 6])
def test_packed_examples(tile_rows, masks_made):
    model = tokenseek.enable_token_ditching(
        tiny_model("mistral", dtype=torch.float64), tile_rows=tile_rows, recompute=True
    )
    assert_same_packed(model, examples((20, 7, 31), (4, 0, 9)), "mistral")
    assert all(len(mask) > 1 for mask in masks_made)  # of the padded batch alone


def test_where_no_kernel_knows_windows_masks_are_made(monkeypatch):
    monkeypatch.setattr(staircase, "is_served", lambda *qkv: False)
    for options in (dict(tile_rows=6), dict(recompute=True)):
        model = tokenseek.enable_token_ditching(tiny_model("mistral", dtype=torch.float64), **options)
        assert_same(model, make_batch((30, 25)), torch.tensor([[3, 20, 29], [0, 24, -1]]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("storage", ["host", "int8_host", "int8"])
def test_what_nobody_sees_is_not_kept(recompute, storage):
    """Of 104 tokens, the last selected 4 see no more than those from 97 - 4 on: 4 selected ones and 7 others."""
    kept = []
    model = tokenseek.enable_token_ditching(tiny_model("mistral"), recompute=recompute, kv_storage=storage)
    with copies_watched(lambda _, tensors: kept.append(max(tensor.shape[2] for tensor in tensors))):
        model(**make_batch((104,)), selected_positions=AT_END).loss.backward()
    assert {n for n in kept if n > 1} == {7 if recompute else 11}


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "gemma3", "mistral"])
def test_with_masks_too(kind, exact_softmax):
    """Eager attention, whose masks say what is seen."""
    kept = []
    model = tiny_model(kind, attn="eager", dtype=torch.float64)
    tokenseek.enable_token_ditching(model, recompute=True, kv_storage="host")
    with copies_watched(lambda _, tensors: kept.append(max(tensor.shape[2] for tensor in tensors))):
        assert_same(model, make_batch((104,)), AT_END, computed_in(kind))
    windows = sum(
        kind == "sliding_attention" for kind in getattr(model.config, "layer_types", ["sliding_attention"] * 4)
    )
    assert kept.count(7) == 2 * windows > 0


def test_what_nobody_sees_is_not_kept_on_the_device():
    kept = []
    model = tokenseek.enable_token_ditching(tiny_model("mistral"), recompute=True)
    with copies_watched(lambda _, tensors: kept.append(tensors[0].shape)):
        model(**make_batch((104,)), selected_positions=AT_END).loss.backward()
    assert kept == [(1, 2, 7, 8)] * 8  # keys and values of four layers


@pytest.mark.parametrize("options", STORED, ids=str)
def test_shared_keys_and_values(options):
    """Gemma 4, whose upper layers take over those of layers below, with windows and without."""
    batch = batch_of_hybrids()
    positions = batch.pop("selected_positions")
    model = tiny_model("gemma4", dtype=torch.float64)
    assert_same(tokenseek.enable_token_ditching(model, **options), batch, positions, computed_in("gemma4"))


@pytest.mark.parametrize("rule", ["context", "gradient", "exact"])
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_steps_that_select(kind, rule, masks_made):
    seeking = Seeking("l2", exact_layers=int(rule == "exact"))
    model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64), tile_rows=7, seeking=seeking)
    chosen = SelectionRule("top", ratio=0.3) if rule == "context" else DRAWN
    batch = make_batch((40, 25))
    model(**batch, selection=chosen, selection_keys=KEYS).loss.backward()
    assert not masks_made
    assert_same_online(model, batch, chosen, computed_in=computed_in(kind), exact_layers=int(rule == "exact"))


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_scores(kind, masks_made):
    model = tiny_model(kind, dtype=torch.float64)
    expected = TokenScorer(model).score(**make_batch((40, 25)))
    assert masks_made
    masks_made.clear()
    actual = TokenScorer(model, tile_rows=7).score(**make_batch((40, 25)))
    assert not masks_made
    assert_close(actual._asdict(), expected._asdict())


def test_other_masks_are_no_windows():
    model = tiny_model("llama")
    config, embeds = model.config, torch.zeros(1, 2, 32)
    config.sliding_window = config.attention_chunk_size = WINDOW
    given = dict(
        config=config, inputs_embeds=embeds, attention_mask=torch.ones(1, 2, dtype=torch.long), past_key_values=None
    )
    with whole_masks(find_decoder(model), 12, None, None, windows=True):
        assert masking_utils.create_sliding_window_causal_mask(**given) == SlidingWindow(WINDOW)
        chunked = masking_utils.create_chunked_causal_mask(**given)
        everywhere = masking_utils.create_sliding_window_causal_mask(
            **given, or_mask_function=lambda batch, head, query, key: key == 0
        )
    assert chunked.shape == everywhere.shape == (1, 1, 12, 12)
