"""Online seeking where an engine splits the model: FSDP2 and ZeRO in every gradient, against one process."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from closeness import assert_close
from distributed.spawn import spawn
from distributed.test_fsdp import RANKS, shard, shard_with_tail
from distributed.test_fsdp import batch as fsdp_batch
from distributed.test_sequence_parallel_zero import LEARNING_RATE, zero_settings
from tiny_models import VOCAB, tiny_model
from torch.distributed.device_mesh import init_device_mesh

import tokenseek
import tokenseek.decoder.head
import tokenseek.seeking.gradient
from tokenseek import SelectionRule
from tokenseek.ditching import Seeking
from tokenseek.parallel import enable_sequence_parallelism

DRAWN = SelectionRule("sampled", ratio=0.4, alpha=0, beta=1, explore=0.3, scope="supervised")
MIXED = SelectionRule("top", ratio=0.4)


def batch(rank: int, rule: SelectionRule) -> dict:
    inputs = fsdp_batch(rank, "uneven")
    del inputs["selected_positions"]
    inputs["labels"][:, : 9 * rank] = -100  # fewer rows go through the head, in fewer chunks
    return {
        **inputs,
        "selection": rule,
        "selection_keys": torch.tensor([2 * rank, 2 * rank + 1]),
        "num_items_in_batch": 40,
    }


def expected_gradients(plain, rule: SelectionRule, seeking: Seeking, batches: int = RANKS) -> dict[str, torch.Tensor]:
    alone = tokenseek.enable_token_ditching(copy.deepcopy(plain), seeking=seeking)
    for rank in range(batches):
        alone(**batch(rank, rule)).loss.backward()
    return {name: p.grad for name, p in alone.named_parameters()}


def few_rows_at_once() -> None:
    """Two rows of logits at once, in scoring and training, of which the ranks have different numbers."""
    tokenseek.decoder.head.CHUNK_BYTES = 4 * VOCAB * 2
    tokenseek.seeking.gradient.FEWEST_ROWS = 2


def fsdp(rank: int, rule: SelectionRule, seeking: Seeking, kind: str = "llama") -> None:
    few_rows_at_once()
    mesh = init_device_mesh("cpu", (RANKS,))
    plain = tiny_model(kind, dtype=torch.float64).train()
    expected = expected_gradients(plain, rule, seeking)
    # Weights of draws are float32; Transformers' norms round to it too, and gradients through them decide the draws.
    computed_in = torch.float32 if seeking.exact_layers else torch.float64
    for shard_model in (shard, shard_with_tail):
        for reshard in (True, False):
            model = tokenseek.enable_token_ditching(copy.deepcopy(plain), seeking=seeking, recompute=not reshard)
            shard_model(model, mesh, reshard_after_forward=reshard)
            for _ in range(2):  # the second step finds what the first has left
                model.zero_grad()
                (model(**batch(rank, rule)).loss * RANKS).backward()  # FSDP divides by the number of ranks
            got = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
            assert_close(got, expected, computed_in)


def zero(rank: int, stage: int, rule: SelectionRule, seeking: Seeking, share: bool = False) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    few_rows_at_once()
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    plain = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    batches = 1 if share else RANKS
    expected = expected_gradients(plain, rule, seeking, batches)
    deepspeed.init_distributed(dist_backend="gloo")
    settings, model = zero_settings(stage), tiny_model("llama")
    model.deepspeed_config = HfDeepSpeedConfig(settings) if stage == 3 else None  # found as long as somebody keeps it
    tokenseek.enable_token_ditching(model, seeking=seeking)
    if share:
        enable_sequence_parallelism(model, torch.distributed.group.WORLD)
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE)
    )
    engine.backward(engine(**batch(rank % batches, rule)).loss * batches)
    engine.step()
    changes = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            changes[name] = (before[name] - parameter.detach()) / LEARNING_RATE
    # A change of weights has the roundings of the weights.
    assert_close(changes, expected, roundings=2000)
    engine.backward(engine(**batch(rank % batches, rule)).loss * batches)  # in the state that the first step has left
    engine.step()


CASES = {
    "gradient": (DRAWN, Seeking("l2")),
    "gradient of two layers": (DRAWN, Seeking("l2", gradient_layer=2)),
    "attention and gradient": (MIXED, Seeking()),
    "error": (DRAWN, Seeking("error")),
    "exact layer": (DRAWN, Seeking("l2", exact_layers=1)),
    "exact layers": (DRAWN, Seeking("l2", exact_layers=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_fsdp2(case):
    spawn(RANKS, fsdp, *CASES[case])


@pytest.mark.parametrize("case", ["gradient", "exact layer"])
def test_fsdp2_of_tied_weights(case):
    spawn(RANKS, fsdp, *CASES[case], "llama_tied")


@pytest.mark.parametrize("case", CASES)
def test_zero3(case):
    pytest.importorskip("deepspeed")
    spawn(RANKS, zero, 3, *CASES[case])


@pytest.mark.parametrize("case", ["gradient", "exact layers"])
def test_zero3_of_ranks_that_share_texts(case):
    pytest.importorskip("deepspeed")
    spawn(RANKS, zero, 3, *CASES[case], True)


@pytest.mark.parametrize("stage", [1, 2])
def test_exact_layers_where_weights_are_whole(stage):
    pytest.importorskip("deepspeed")
    spawn(RANKS, zero, stage, DRAWN, Seeking("l2", exact_layers=1))
