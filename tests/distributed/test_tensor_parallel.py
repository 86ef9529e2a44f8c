"""Transformers' tensor parallelism: loss and gradients equal those of one process, with token ditching."""

from pathlib import Path

import torch
from closeness import assert_close
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


def compare(rank, folders):
    """Number of parameters that each model has split."""
    splits = []
    for folder in folders:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        expected = dense_loss(whole, **batch())
        expected.backward()
        gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for recompute in (False, True):
            model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64).train()
            loss = enable_token_ditching(model, recompute=recompute)(**batch()).loss
            assert_close(loss, expected)
            loss.backward()
            splits.append(0)
            found = {name: parameter.grad for name, parameter in model.named_parameters()}
            for name, gradient in found.items():
                if isinstance(gradient, DTensor):
                    splits[-1] += gradient.to_local().shape != gradient.shape
                    found[name] = gradient.full_tensor()
            assert_close(found, gradients)
    return splits


def test_loss_and_gradients_equal_one_process(tmp_path):
    folders = [str(tmp_path / kind) for kind in ("llama", "qwen3")]
    for folder in folders:
        tiny_model(Path(folder).name, dtype=torch.float64, vocab_size=VOCAB + 1).save_pretrained(folder)
    for splits in spawn(RANKS, compare, folders):
        assert len(splits) == 4 and min(splits) >= 4 * 7  # the seven linear maps of each of four layers
