"""Online seeking where an engine splits the model: FSDP2 and ZeRO in every gradient, against one process."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from closeness import assert_close
from distributed.spawn import spawn
from distributed.test_fsdp import RANKS, shard
from distributed.test_fsdp import batch as fsdp_batch
from distributed.test_sequence_parallel_zero import LEARNING_RATE, zero_settings
from tiny_models import tiny_model
from torch.distributed.device_mesh import init_device_mesh

import tokenseek
from tokenseek import SelectionRule, UserError
from tokenseek.ditching import Seeking

DRAWN = SelectionRule("sampled", ratio=0.4, alpha=0, beta=1, explore=0.3, scope="supervised")
MIXED = SelectionRule("top", ratio=0.4)


def batch(rank: int, rule: SelectionRule) -> dict:
    inputs = fsdp_batch(rank, "uneven")
    del inputs["selected_positions"]
    return {
        **inputs,
        "selection": rule,
        "selection_keys": torch.tensor([2 * rank, 2 * rank + 1]),
        "num_items_in_batch": 40,
    }


def expected_gradients(plain, rule: SelectionRule, seeking: Seeking) -> dict[str, torch.Tensor]:
    alone = tokenseek.enable_token_ditching(copy.deepcopy(plain), seeking=seeking)
    for rank in range(RANKS):
        alone(**batch(rank, rule)).loss.backward()
    return {name: p.grad for name, p in alone.named_parameters()}


def fsdp(rank: int, rule: SelectionRule, seeking: Seeking) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    plain = tiny_model("llama", dtype=torch.float64).train()
    expected = expected_gradients(plain, rule, seeking)
    for reshard in (True, False):
        model = shard(
            tokenseek.enable_token_ditching(copy.deepcopy(plain), seeking=seeking), mesh, reshard_after_forward=reshard
        )
        for _ in range(2):  # the second step finds what the first has left
            model.zero_grad()
            (model(**batch(rank, rule)).loss * RANKS).backward()  # FSDP divides by the number of ranks
        assert_close({name: p.grad.full_tensor() for name, p in model.named_parameters()}, expected)


def zero(rank: int, stage: int, rule: SelectionRule, seeking: Seeking) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    plain = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    expected = expected_gradients(plain, rule, seeking)
    deepspeed.init_distributed(dist_backend="gloo")
    settings, model = zero_settings(stage), tiny_model("llama")
    model.deepspeed_config = HfDeepSpeedConfig(settings) if stage == 3 else None  # found as long as somebody keeps it
    tokenseek.enable_token_ditching(model, seeking=seeking)
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE)
    )
    engine.backward(engine(**batch(rank, rule)).loss * RANKS)
    engine.step()
    changes = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            changes[name] = (before[name] - parameter.detach()) / LEARNING_RATE
    # A change of weights has the roundings of the weights.
    assert_close(changes, expected, roundings=2000)
    engine.backward(engine(**batch(rank, rule)).loss * RANKS)  # in the state that the first step has left
    engine.step()


CASES = {
    "gradient": (DRAWN, Seeking("l2")),
    "gradient of two layers": (DRAWN, Seeking("l2", gradient_layer=2)),
    "attention and gradient": (MIXED, Seeking()),
    "error": (DRAWN, Seeking("error")),
}


@pytest.mark.parametrize("case", CASES)
def test_fsdp2(case):
    spawn(RANKS, fsdp, *CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_zero3(case):
    pytest.importorskip("deepspeed")
    spawn(RANKS, zero, 3, *CASES[case])


@pytest.mark.parametrize("stage", [1, 2])
def test_exact_layers_where_weights_are_whole(stage):
    pytest.importorskip("deepspeed")
    spawn(RANKS, zero, stage, DRAWN, Seeking("l2", exact_layers=1))


def refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = shard(tokenseek.enable_token_ditching(tiny_model("llama"), seeking=Seeking("l2", exact_layers=1)), mesh)
    with pytest.raises(UserError, match="exact_layers is incompatible with ZeRO-3 and FSDP2"):
        model(**batch(rank, DRAWN))


def test_exact_layers_where_weights_are_split_are_refused():
    spawn(RANKS, refused)
