"""Sequence parallelism beside ZeRO, which shards optimizer, gradients and parameters over all ranks."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from closeness import assert_close
from distributed.sequence_cases import Case, gradients, make_inputs, positions
from distributed.spawn import spawn
from numerics.dense_reference import dense_loss
from tiny_models import VOCAB, tiny_model

from tokenseek import enable_token_ditching
from tokenseek.parallel import enable_sequence_parallelism

pytest.importorskip("deepspeed")

STEPS, LEARNING_RATE = 2, 0.1
CASES = [Case(), Case(lengths=(6, 11), selected=((1, 2), (3, 9, 10)))]


def batch_of(case: Case, seed: int) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, seed)
    return inputs | dict(selected_positions=positions(case, inputs), num_items_in_batch=10)


def zero_settings(stage: int) -> dict:
    return dict(
        train_micro_batch_size_per_gpu=1,
        # Nothing gathered stays for its next use, as in models too large for that.
        zero_optimization=dict(
            stage=stage,
            stage3_param_persistence_threshold=0,
            stage3_max_reuse_distance=0,
            stage3_prefetch_bucket_size=0,
            overlap_comm=False,
        ),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        gradient_clipping=0.0,  # by default it is 1
    )


def train(rank: int, stage: int, data_parallel: int) -> None:
    """Losses and changes of weights are those of plain gradient descent on one process."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    batches = [batch_of(case, seed) for seed, case in enumerate(CASES[:data_parallel])]
    reference = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    expected_losses = []
    for _ in range(STEPS):
        losses = [dense_loss(reference, **batch) for batch in batches]
        expected_losses.append([loss.item() for loss in losses])
        updates = gradients(reference, sum(losses))
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter -= LEARNING_RATE * updates[name]

    deepspeed.init_distributed(dist_backend="gloo")
    mesh = dist.init_device_mesh(
        "cpu", (data_parallel, dist.get_world_size() // data_parallel), mesh_dim_names=("dp", "sp")
    )
    settings = zero_settings(stage)
    model = tiny_model("llama")
    model.deepspeed_config = HfDeepSpeedConfig(settings) if stage == 3 else None  # found as long as somebody keeps it
    enable_token_ditching(model)
    enable_sequence_parallelism(model, mesh["sp"].get_group())
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE)
    )
    mine = mesh["dp"].get_local_rank()
    losses, changes, expected_changes = [], {}, {}
    for _ in range(STEPS):
        loss = engine(**batches[mine]).loss
        losses.append(loss.item())
        # ZeRO averages over all ranks; over the data-parallel ones it is to be a sum, as in Transformers' Trainer.
        engine.backward(loss * data_parallel)
        engine.step()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            changes[name], expected_changes[name] = parameter - before[name], expected - before[name]
    assert_close(losses, [of_ranks[mine] for of_ranks in expected_losses], torch.float32)
    assert_close(changes, expected_changes)


@pytest.mark.parametrize("stage,ranks,data_parallel", [(2, 2, 1), (3, 2, 1), (2, 4, 2), (3, 4, 2)])
def test_training_equals_one_process(stage, ranks, data_parallel):
    spawn(ranks, train, stage, data_parallel, timeout=200)


def uneven_chunks(rank: int) -> None:
    """Losses of ranks whose supervised rows fill different numbers of the head's chunks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    import tokenseek.decoder.head

    tokenseek.decoder.head.CHUNK_BYTES = 4 * VOCAB * 2  # two rows
    batch = batch_of(Case(lengths=(13,), selected=[((2,),), ((2, 3, 4, 5, 6, 7, 8),)][rank]), seed=0)
    expected = dense_loss(tiny_model("llama"), **batch).item()
    deepspeed.init_distributed(dist_backend="gloo")
    model = tiny_model("llama")
    settings = zero_settings(3)
    model.deepspeed_config = HfDeepSpeedConfig(settings)
    engine, *_ = deepspeed.initialize(
        model=enable_token_ditching(model), config=settings, optimizer=torch.optim.SGD(model.parameters(), 0.0)
    )
    losses = []
    for _ in range(2):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert_close(losses, [expected, expected], torch.float32)


def test_ranks_with_different_numbers_of_supervised_rows_under_zero3():
    spawn(2, uneven_chunks, timeout=100)
