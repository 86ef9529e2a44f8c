"""ZeRO-3 fetches ahead by the order of modules that it has recorded: the same in every step, whatever its rows."""

from __future__ import annotations

import os

import pytest
import torch
from closeness import assert_close
from distributed.sequence_cases import Case
from distributed.spawn import spawn
from distributed.test_sequence_parallel_zero import LEARNING_RATE, batch_of, zero_settings
from numerics.dense_reference import dense_loss
from tiny_models import VOCAB, tiny_model

from tokenseek import enable_token_ditching
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching.zero3 import LAYERS_AHEAD, fetch_a_layer_ahead

pytest.importorskip("deepspeed")

# Selected positions of the ranks in each step: 1 to 4 chunks of two rows, of other numbers on the other rank.
STEPS = [((2,), (2, 3, 4, 5, 6, 7, 8)), ((2, 3, 5), (4,)), ((2, 5), (3, 4, 6, 9)), ((1, 2, 3, 4, 5), (7, 8))]


def trained(model, frozen_head: bool) -> list[torch.nn.Parameter]:
    if frozen_head:
        model.lm_head.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def one_order(rank: int, frozen_head: bool, recompute: bool) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from transformers.integrations import HfDeepSpeedConfig

    import tokenseek.decoder.head

    tokenseek.decoder.head.CHUNK_BYTES = 4 * VOCAB * 2  # two rows
    batches = [[batch_of(Case(lengths=(13,), selected=(rows,)), seed=0) for rows in step] for step in STEPS]
    reference = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    optimizer = torch.optim.SGD(trained(reference, frozen_head), LEARNING_RATE)
    expected = []
    for step in batches:
        losses = [dense_loss(reference, **batch) for batch in step]
        expected.append(losses[rank].item())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()

    deepspeed.init_distributed(dist_backend="gloo")
    model, settings = tiny_model("llama"), zero_settings(3)
    settings["zero_optimization"]["stage3_prefetch_bucket_size"] = "auto"
    fetch_a_layer_ahead(find_decoder(model), settings["zero_optimization"])
    model.deepspeed_config = HfDeepSpeedConfig(settings)
    engine, *_ = deepspeed.initialize(
        model=enable_token_ditching(model, recompute=recompute),
        config=settings,
        optimizer=torch.optim.SGD(trained(model, frozen_head), LEARNING_RATE),
    )
    fetches, invalidated = [], []
    fetch, invalidate = (
        PartitionedParameterCoordinator.fetch_sub_module,
        PartitionedParameterCoordinator._invalidate_trace,
    )

    def noted(self, module, forward):
        fetches.append((module is model.lm_head, forward))
        return fetch(self, module, forward)

    PartitionedParameterCoordinator.fetch_sub_module = noted
    PartitionedParameterCoordinator._invalidate_trace = lambda self: (invalidated.append(1), invalidate(self))
    losses = []
    for step in batches:
        fetches.clear()
        loss = engine(**step[rank]).loss
        engine.backward(loss * len(step))
        engine.step()
        losses.append(loss.item())
        assert [forward for is_head, forward in fetches if is_head] == [True, False]
    assert not invalidated
    assert_close(losses, expected, torch.float32)
    changes, expected_changes = {}, {}
    for (name, parameter), of_reference in zip(model.named_parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            changes[name], expected_changes[name] = parameter - before[name], of_reference - before[name]
    assert_close(changes, expected_changes)


@pytest.mark.parametrize("frozen_head,recompute", [(False, False), (False, True), (True, False)])
def test_one_order_whatever_the_rows(frozen_head, recompute):
    spawn(2, one_order, frozen_head, recompute, timeout=150)


def test_the_bucket_holds_more_than_a_layer():
    decoder = find_decoder(tiny_model("llama"))
    largest = sum(p.numel() for p in decoder.layers[0].parameters())
    zero = {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    fetch_a_layer_ahead(decoder, zero)
    assert zero == {
        "stage3_prefetch_bucket_size": int(LAYERS_AHEAD * largest),
        "stage3_param_persistence_threshold": "auto",
    }
    for chosen in ({"stage3_prefetch_bucket_size": 7}, {}):
        given = dict(chosen)
        fetch_a_layer_ahead(decoder, given)
        assert given == chosen
