"""Transformers' tensor parallelism: loss and gradients equal those of one process, with token ditching."""

import pytest
import torch
from distributed.spawn import spawn
from numerics.dense_reference import dense_loss
from tiny_models import VOCAB, tiny_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tokenseek import enable_token_ditching

RANKS = 2


def batch():
    ids = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(13) < torch.tensor([[13], [9]])
    labels = ids.masked_fill(~mask, -100)
    labels[:, :2] = -100
    selected = torch.tensor([[1, 4, 5, 11], [0, 7, -1, -1]])
    return dict(input_ids=ids, attention_mask=mask.long(), labels=labels, selected_positions=selected)


def compare(rank, folder, kind, recompute):
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64).train()
    print(rank, model.tp_size, {n: (type(p).__name__, tuple(p.shape)) for n, p in model.named_parameters()})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = dense_loss(reference, **batch())
    expected.backward()
    enable_token_ditching(model, recompute=recompute)
    loss = model(**batch()).loss
    assert abs(loss.item() - expected.item()) < 1e-12 * expected.item(), (loss.item(), expected.item())
    loss.backward()
    split = 0
    whole = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, full = parameter.grad, whole[name].grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if gradient.shape != full.shape:
            split += 1
            (dim,) = [d for d in range(full.dim()) if gradient.shape[d] != full.shape[d]]
            full = full.chunk(RANKS, dim)[rank]
        error = (gradient - full).norm() / full.norm()
        assert error < 1e-12, (name, error)
    return split


@pytest.mark.parametrize("kind", ["llama"])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_equal_one_process(kind, recompute, tmp_path):
    tiny_model(kind, dtype=torch.float64, vocab_size=VOCAB + 1).save_pretrained(tmp_path)
    splits = spawn(RANKS, compare, str(tmp_path), kind, recompute)
    print(splits)
