"""DDP that does not look for parameters without a gradient: a step leaves none out, even where a rank has no loss."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close
from distributed.spawn import spawn
from distributed.test_fsdp import RANKS, batch, expected_gradients, num_items
from distributed.test_online_engines import DRAWN
from distributed.test_online_engines import batch as online_batch
from distributed.test_online_engines import expected_gradients as online_gradients
from tiny_models import tiny_model
from torch.nn.parallel import DistributedDataParallel

from tokenseek import enable_token_ditching
from tokenseek.decoder.find import leaves_parameters_out
from tokenseek.ditching import Seeking


def ddp(rank: int, kind: str, recompute: bool) -> None:
    for selected in ("uneven", "none"):
        plain = tiny_model(kind, dtype=torch.float64).eval()  # without dropout
        expected = expected_gradients(copy.deepcopy(plain), selected)
        assert_close(
            gradients(plain, [batch(rank, selected) | {"num_items_in_batch": num_items(selected)}] * 2, recompute),
            expected,
        )


def online(rank: int) -> None:
    plain = tiny_model("llama", dtype=torch.float64).train()
    expected = online_gradients(plain, DRAWN, Seeking("l2"))
    assert_close(gradients(plain, [online_batch(rank, DRAWN)] * 2, False, seeking=Seeking("l2")), expected)


def gradients(plain, batches: list[dict], recompute: bool, **options) -> dict[str, torch.Tensor]:
    """Of the last batch; the step before would leave DDP waiting for a parameter without a gradient."""
    assert not leaves_parameters_out(plain)
    model = DistributedDataParallel(enable_token_ditching(plain, recompute=recompute, **options))
    for inputs in batches:
        model.zero_grad()
        (model(**inputs).loss * RANKS).backward()  # DDP divides by the number of ranks
    return {name: p.grad for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("kind,recompute", [("llama", False), ("llama_tied", True), ("gpt2", False)])
def test_every_parameter_has_a_gradient(kind, recompute):
    spawn(RANKS, ddp, kind, recompute)


def test_online():
    spawn(RANKS, online)


def test_what_may_be_left_out():
    model = tiny_model("llama")
    assert not leaves_parameters_out(model)
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    assert leaves_parameters_out(model)
    model = tiny_model("llama")
    model.model.layers[1].self_attn.is_kv_shared_layer = True
    assert leaves_parameters_out(model)
    model = tiny_model("llama")
    model.beside = torch.nn.Linear(2, 2)
    assert leaves_parameters_out(model)
    model.beside.requires_grad_(False)
    assert not leaves_parameters_out(model)
