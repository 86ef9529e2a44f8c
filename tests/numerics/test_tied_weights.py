"""The embedding's rows are added into the head's gradient: the same numbers, and one matrix less.

That gradients equal the dense reference's is tested for every architecture (`test_ditching`), tied ones among them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import SELECTED, assert_same, gradients, make_batch
from tiny_models import tiny_model

import tokenseek
from benchmarks.memory import LiveStorages
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import embedding


def tied(kind="llama_tied", dtype=torch.float64, **config):
    return tokenseek.enable_token_ditching(tiny_model(kind, dtype=dtype, **config))


def rows_to_add(model):
    return find_decoder(model).causal_lm.get_input_embeddings().weight.__dict__.get("_rows_to_add")


@pytest.mark.parametrize("kind", ["llama_tied", "gemma3", "gpt2", "opt"])  # gemma3 scales its embeddings
def test_a_step_makes_one_gradient_of_the_vocabulary_s_size(kind, monkeypatch):
    def peak(model):
        with LiveStorages().ignore(model.parameters()) as live:
            model(**make_batch(), selected_positions=SELECTED).loss.backward()
        model.zero_grad()
        return live.peak

    model = tied(kind, torch.float32, vocab_size=5000)
    matrix = find_decoder(model).causal_lm.get_input_embeddings().weight.numel() * 4
    with_one = peak(model)
    assert rows_to_add(model)
    monkeypatch.setattr(embedding, "_is_tied", lambda table, head: False)
    with_two = peak(model)
    assert with_one < 2 * matrix and with_two - with_one > 0.9 * matrix


def test_weights_that_are_not_tied_are_left_to_autograd():
    model = tied("llama")
    assert_same(model, make_batch(), SELECTED)
    assert rows_to_add(model) is None


def test_the_row_of_padding_has_no_gradient_from_the_embedding():
    batch = make_batch((13, 9))
    batch["input_ids"][0, 4] = 0  # padding_idx, in the midst of a text
    model = tied()
    assert model.get_input_embeddings().padding_idx == 0
    assert_same(model, batch, SELECTED)


def test_losses_can_be_summed_accumulated_and_gone_through_again():
    model, batches = tied(), [make_batch(seed=0), make_batch(seed=1)]

    def losses():
        return [model(**batch, selected_positions=SELECTED).loss for batch in batches]

    one_by_one = [gradients(model, loss) for loss in losses()]
    expected = {name: one_by_one[0][name] + one_by_one[1][name] for name in one_by_one[0]}

    def assert_expected(found, factor=1):
        assert_close(found, {name: factor * gradient for name, gradient in expected.items()})

    assert_expected(gradients(model, sum(losses())))
    model.zero_grad()
    for loss in losses():
        loss.backward()
    assert_expected({name: p.grad for name, p in model.named_parameters()})
    model.zero_grad()
    total = sum(losses())
    total.backward(retain_graph=True)
    total.backward()
    assert_expected({name: p.grad for name, p in model.named_parameters()}, 2)
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert_expected(dict(zip(names, torch.autograd.grad(sum(losses()), parameters), strict=True)))


def test_rows_of_a_backward_pass_that_broke_off_are_forgotten():
    model, batch = tied(), make_batch()
    weight = model.get_input_embeddings().weight
    model(**batch, selected_positions=SELECTED)
    # After the embedding's backward pass, and before the rest of the hooks.
    other = rows_to_add(model)
    other.rows.append((batch["input_ids"].flatten(), torch.ones(batch["input_ids"].numel(), weight.shape[1])))
    assert_same(model, batch, SELECTED)


def test_tokens_that_occur_often_are_summed_in_float32():
    weight = torch.zeros(5, 4, dtype=torch.bfloat16)
    ids = torch.tensor([3] * 1000 + [1])
    embedding._add_rows(weight, ids, torch.full((1001, 4), 0.01, dtype=torch.bfloat16))
    expected = 1000 * torch.tensor(0.01, dtype=torch.bfloat16).float()
    assert torch.equal(weight[3], expected.bfloat16().expand(4))
    assert torch.equal(weight[[0, 2, 4]], torch.zeros(3, 4, dtype=torch.bfloat16)) and weight[1, 0] == weight[1, 3] > 0


def test_it_goes_with_ditching_and_is_not_copied():
    model, batch = tied(), make_batch()
    assert_same(model, batch, SELECTED)
    other = copy.deepcopy(model)
    assert rows_to_add(model) and not rows_to_add(other)
    assert_same(other, batch, SELECTED)
    weight = model.get_input_embeddings().weight
    tokenseek.disable_token_ditching(model)
    assert rows_to_add(model) is None and not weight._backward_hooks
