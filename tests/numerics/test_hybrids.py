"""Layers with a state, and layers that share keys and values, against the dense reference."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close
from numerics.dense_reference import dense_loss
from tiny_models import HYBRIDS, VOCAB, computed_in, tiny_model

import tokenseek
from tokenseek import SelectionRule, UserError
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import Seeking
from tokenseek.seeking import TokenScorer

LENGTHS = (23, 17)


def batch(seed=0, left=False):
    generator = torch.Generator().manual_seed(seed)
    longest = max(LENGTHS)
    ids = torch.randint(3, VOCAB, (len(LENGTHS), longest), generator=generator)
    mask = torch.stack([(torch.arange(longest) < n).long() for n in LENGTHS])
    positions = torch.tensor([[1, 4, 5, 11, 22], [0, 3, 16, -1, -1]])
    if left:
        mask, positions = mask.flip(1), torch.tensor([[1, 4, 5, 11, 22], [6, 9, 22, -1, -1]])
    labels = ids.masked_fill(mask == 0, -100)
    return dict(input_ids=ids * mask, attention_mask=mask, labels=labels, selected_positions=positions)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, expected, kind):
    ours = gradients(model)
    for name, gradient in expected.items():
        ours.setdefault(name, torch.zeros_like(gradient))
    assert_close(ours, expected, computed_in(kind))


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"tile_rows": 4}], ids=["store", "recompute", "tiles"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_gradients_are_those_of_the_dense_reference(kind, options):
    model = tiny_model(kind, dtype=torch.float64).train()
    expected = copy.deepcopy(model)
    given = batch()
    loss = dense_loss(expected, **given)
    loss.backward()
    tokenseek.enable_token_ditching(model, **options)
    output = model(**given)
    output.loss.backward()
    assert_close(output.loss, loss, computed_in(kind))
    assert_same_gradients(model, gradients(expected), kind)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_padding_on_the_left(kind):
    model = tiny_model(kind, dtype=torch.float64).train()
    expected, given = copy.deepcopy(model), batch(left=True)
    loss = dense_loss(expected, **given)
    loss.backward()
    output = tokenseek.enable_token_ditching(model)(**given)
    output.loss.backward()
    assert_close(output.loss, loss, computed_in(kind))
    assert_same_gradients(model, gradients(expected), kind)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_all_tokens_selected_are_ordinary_training(kind):
    model = tiny_model(kind, dtype=torch.float64).train()
    ids = batch()["input_ids"][:1]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    tokenseek.enable_token_ditching(model)
    ours = model(input_ids=ids, labels=ids, selected_positions=torch.arange(ids.shape[1])[None]).loss
    ours.backward()
    assert_close(ours, loss, torch.float32)  # Transformers' loss
    assert_same_gradients(model, expected, "gemma2")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rule", [("random", {}), ("top", {"alpha": 1.0, "beta": 1.0})], ids=["random", "top"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_steps_that_select_are_those_of_their_positions(kind, rule, recompute):
    model = tiny_model(kind, dtype=torch.float64).train()
    expected, given = copy.deepcopy(model), batch()
    tokenseek.enable_token_ditching(model, recompute=recompute, seeking=Seeking("l2"))
    del given["selected_positions"]
    selection = SelectionRule(rule[0], ratio=0.3, **rule[1])
    output = model(**given, selection=selection, selection_keys=torch.tensor([3, 4]))
    output.loss.backward()
    loss = dense_loss(
        expected,
        **given,
        selected_positions=output.selected_positions,
        selected_weights=output.selected_weights,
        num_items_in_batch=(given["labels"][:, 1:] != -100).sum(),
    )
    loss.backward()
    assert_close(output.loss, loss, computed_in(kind))
    assert_same_gradients(model, gradients(expected), kind)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_scores_are_those_of_the_attention_map_and_the_gradient(kind):
    eager, sdpa = (tiny_model(kind, attn=attn, dtype=torch.float64) for attn in ("eager", "sdpa"))
    given = {name: tensor[:1] for name, tensor in batch().items()}  # the eager map has NaN where all is padding
    scores = TokenScorer(sdpa).score(given["input_ids"], given["attention_mask"], given["labels"])
    decoder = find_decoder(eager)
    maps = []
    attending = [layer for layer in decoder.layers if layer not in decoder.mixers]
    for module in attending[-1].modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(lambda _, __, output: maps.append(output[1]))
    eager(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    assert_close(scores.context.double(), maps[0].sum(2).mean(1).double(), torch.float32)
    assert scores.gradient[:, :-1].masked_select(given["attention_mask"][:, :-1].bool()).ne(0).any()


def test_packed_examples_would_go_on_in_each_others_state():
    model = tokenseek.enable_token_ditching(tiny_model("qwen3_5")).train()
    ids = torch.randint(3, VOCAB, (1, 8))
    with pytest.raises(UserError, match="carries a state .* Pad the examples"):
        model(
            input_ids=ids,
            labels=ids,
            position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
            selected_positions=torch.tensor([[1, 5]]),
        )


def test_exact_layers_past_shared_keys_and_values():
    model = tokenseek.enable_token_ditching(tiny_model("gemma4"), seeking=Seeking("l2", exact_layers=1)).train()
    rule = SelectionRule("sampled", ratio=0.3, alpha=0.0, beta=1.0, explore=0.1)
    given = batch()
    del given["selected_positions"]
    with pytest.raises(UserError, match="exact_layers is 1, and Gemma4ForCausalLM has layers that share"):
        model(**given, selection=rule, selection_keys=torch.tensor([3, 4]))


@pytest.mark.parametrize("kind", [kind for kind in HYBRIDS if kind != "gemma4"])
def test_exact_top_layers(kind):
    model = tiny_model(kind, dtype=torch.float64).train()
    expected, given = copy.deepcopy(model), batch()
    tokenseek.enable_token_ditching(model, seeking=Seeking("l2", exact_layers=1))
    del given["selected_positions"]
    rule = SelectionRule("sampled", ratio=0.3, alpha=0.0, beta=1.0, explore=0.1)
    given["num_items_in_batch"] = 16  # norms of float32 round alike before and after a division by it
    output = model(**given, selection=rule, selection_keys=torch.tensor([3, 4]))
    output.loss.backward()
    loss = dense_loss(
        expected,
        **given,
        selected_positions=output.selected_positions,
        selected_weights=output.selected_weights,
        exact_layers=1,
    )
    loss.backward()
    assert_close(output.loss, loss, computed_in(kind))
    assert_same_gradients(model, gradients(expected), kind)
