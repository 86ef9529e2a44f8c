"""The loss of the selected tokens: what divides it, in chunks, and the logits that it holds."""

from __future__ import annotations

import weakref

import pytest
import torch
from numerics.test_ditching import SELECTED, assert_same, gradients, make_batch
from tiny_models import VOCAB, tiny_model

import tokenseek
from benchmarks.memory import LiveStorages


@pytest.mark.parametrize(
    "selected", [torch.full((2, 3), -1), torch.empty(2, 0, dtype=torch.long), torch.tensor([[0], [1]])]
)
def test_nothing_selected_or_supervised_gives_zero_loss_and_a_live_graph(selected):
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    loss = model(**make_batch(), selected_positions=selected).loss
    assert loss.item() == 0.0
    for name, gradient in gradients(model, loss).items():
        assert gradient is not None and not gradient.any(), name


def test_one_example_without_selection_beside_one_with():
    model = tokenseek.enable_token_ditching(tiny_model("qwen2", dtype=torch.float64))
    assert_same(model, make_batch(), torch.tensor([[2, 6], [-1, -1]]))


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_num_items_in_batch_divides_the_sum(items):
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64))
    assert_same(model, make_batch(), SELECTED, num_items_in_batch=items)


def test_loss_in_chunks(monkeypatch):
    monkeypatch.setattr("tokenseek.decoder.head.CHUNK_BYTES", 4 * VOCAB * 2)
    model = tokenseek.enable_token_ditching(tiny_model("granite", dtype=torch.float64))
    assert_same(model, make_batch(), SELECTED)


@pytest.mark.parametrize("chunk_rows", [2, 1000])
@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_a_kept_graph_gives_the_same_gradients_again(monkeypatch, recompute, chunk_rows):
    monkeypatch.setattr("tokenseek.decoder.head.CHUNK_BYTES", 4 * VOCAB * chunk_rows)
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64), recompute=recompute)
    loss = model(**make_batch(), selected_positions=SELECTED).loss
    parameters = list(model.parameters())
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_cross_entropy_holds_two_matrices_of_logits_at_most(monkeypatch, trained):
    model = tiny_model("llama", vocab_size=4096, hidden_size=8).bfloat16()
    model.get_output_embeddings().weight.requires_grad_(trained)
    tokenseek.enable_token_ditching(model, recompute=True)
    batch = make_batch()
    rows = int(batch["labels"][:, 1:].ne(-100).sum())
    monkeypatch.setattr("tokenseek.decoder.head.CHUNK_BYTES", 4 * 4096 * rows)
    everywhere = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    everywhere = everywhere.masked_fill(batch["attention_mask"] == 0, -1)
    with LiveStorages().ignore(model.parameters()) as live:
        loss = model(**batch, selected_positions=everywhere).loss
        forward_peak = live.peak
        loss.backward()
    matrix, weights = 4 * 4096 * rows, sum(p.nbytes for p in model.parameters())
    assert forward_peak < 2 * matrix  # float32 and, beside it, 16 bits
    assert live.peak < 2 * matrix + 2 * weights


@pytest.mark.parametrize("chunk_rows", [3, 1000])
@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_a_head_that_is_not_trained_runs_once_and_keeps_no_logits(monkeypatch, recompute, chunk_rows):
    monkeypatch.setattr("tokenseek.decoder.head.CHUNK_BYTES", 4 * VOCAB * chunk_rows)
    model = tiny_model("granite", dtype=torch.float64)  # which scales its logits
    model.get_output_embeddings().weight.requires_grad_(False)
    tokenseek.enable_token_ditching(model, recompute=recompute)
    assert_same(model, make_batch(), SELECTED)
    assert_same(model, make_batch(), SELECTED, num_items_in_batch=7)

    calls, logits = [], []

    def watch(head, args, output):
        calls.append(output.shape[1])
        logits.append(weakref.ref(output.untyped_storage()))

    model.get_output_embeddings().register_forward_hook(watch)
    loss = model(**make_batch(), selected_positions=SELECTED).loss
    assert not any(reference() for reference in logits)
    loss.backward()
    assert calls == ([3, 1] if chunk_rows == 3 else [4])  # four selected positions are supervised
