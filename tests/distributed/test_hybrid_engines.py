"""Layers with a state where an engine splits the model: FSDP2 and ZeRO-3 in every gradient, against one process."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from closeness import assert_close
from distributed.spawn import spawn
from distributed.test_fsdp import RANKS, shard, shard_with_tail
from distributed.test_online_engines import DRAWN, batch, few_rows_at_once
from distributed.test_sequence_parallel_zero import LEARNING_RATE, zero_settings
from numerics.dense_reference import dense_loss
from tiny_models import HYBRIDS, computed_in, tiny_model
from torch.distributed.device_mesh import init_device_mesh

import tokenseek
from tokenseek.ditching import Seeking

SEEKING = {
    "given": None,
    "gradient": Seeking("l2"),
    "exact layer": Seeking("l2", exact_layers=1),
}
CASES = [
    # Two kinds in every run of the tests, the others when all are asked for.
    pytest.param(kind, seeking, marks=[] if kind in ("lfm2", "qwen3_next") else [pytest.mark.slow])
    for kind in HYBRIDS
    for seeking in SEEKING
    if (kind, seeking) != ("gemma4", "exact layer")  # refused, since its top layers share keys and values
]


def batch_of(rank: int, seeking: Seeking | None) -> dict:
    """Two texts of other lengths, with other numbers of selected tokens on the other rank."""
    inputs = batch(rank, DRAWN)
    ids = inputs["input_ids"]
    inputs["attention_mask"] = torch.ones_like(ids)
    inputs["attention_mask"][1, 9 + rank :] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    if seeking is None:
        del inputs["selection"], inputs["selection_keys"]
        inputs["selected_positions"] = torch.tensor([[[1, 4, 5, 11], [0, 7, 8, -1]], [[3, -1], [5, 9]]][rank])
    return inputs


def expected_of(plain: torch.nn.Module, seeking: Seeking | None) -> dict[str, torch.Tensor]:
    """Gradients of both ranks' batches on one process; of given positions by the dense reference."""
    alone = copy.deepcopy(plain)
    if seeking is not None:
        tokenseek.enable_token_ditching(alone, seeking=seeking)
    for rank in range(RANKS):
        inputs = batch_of(rank, seeking)
        loss = dense_loss(alone, **inputs) if seeking is None else alone(**inputs).loss
        loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in alone.named_parameters()}


def fsdp(rank: int, kind: str, seeking: Seeking | None) -> None:
    few_rows_at_once()
    mesh = init_device_mesh("cpu", (RANKS,))
    plain = tiny_model(kind, dtype=torch.float64).train()
    expected = expected_of(plain, seeking)
    for shard_model in (shard, shard_with_tail):
        for reshard in (True, False):
            model = copy.deepcopy(plain)
            tokenseek.enable_token_ditching(model, seeking=seeking or Seeking(), recompute=not reshard)
            shard_model(model, mesh, reshard_after_forward=reshard)
            for _ in range(2):  # the second step finds what the first has left
                model.zero_grad()
                (model(**batch_of(rank, seeking)).loss * RANKS).backward()  # FSDP divides by the number of ranks
            got = {
                name: torch.zeros_like(expected[name]) if p.grad is None else p.grad.full_tensor()
                for name, p in model.named_parameters()
            }
            assert_close(got, expected, torch.float32 if seeking and seeking.exact_layers else computed_in(kind))


def zero3(rank: int, kind: str, seeking: Seeking | None, recompute: bool) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    few_rows_at_once()
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    plain = tiny_model(kind)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    expected = expected_of(plain, seeking)
    deepspeed.init_distributed(dist_backend="gloo")
    settings, model = zero_settings(3), tiny_model(kind)
    model.deepspeed_config = HfDeepSpeedConfig(settings)  # found as long as somebody keeps it
    tokenseek.enable_token_ditching(model, seeking=seeking or Seeking(), recompute=recompute)
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE)
    )
    engine.backward(engine(**batch_of(rank, seeking)).loss * RANKS)
    engine.step()
    changes = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            changes[name] = (before[name] - parameter.detach()) / LEARNING_RATE
    # A change of weights has the roundings of the weights.
    assert_close(changes, expected, roundings=2000)
    engine.backward(engine(**batch_of(rank, seeking)).loss * RANKS)  # in the state that the first step has left
    engine.step()


@pytest.mark.parametrize("kind,seeking", CASES)
def test_fsdp2(kind, seeking):
    spawn(RANKS, fsdp, kind, SEEKING[seeking])


@pytest.mark.parametrize("kind,seeking", CASES)
def test_zero3(kind, seeking):
    pytest.importorskip("deepspeed")
    spawn(RANKS, zero3, kind, SEEKING[seeking], seeking == "gradient")
