"""FSDP2: torch's `fully_shard` on every decoder layer, over gloo; gradients exact, and one gather for the two passes.

Through accelerate: `tests/launch/test_engines.py`.
"""

import copy

import pytest
import torch
from closeness import assert_close
from distributed.spawn import spawn
from numerics.dense_reference import dense_loss
from tiny_models import VOCAB, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import tokenseek.decoder.head
from tokenseek import enable_token_ditching
from tokenseek.decoder.find import find_decoder

RANKS, TOKENS = 2, 12
# Rank 1 has fewer selected tokens than rank 0, and in the second case none that carries a loss.
SELECTED = {"uneven": [[[1, 4, 5, 11], [0, 7, 8, -1]], [[3, -1], [5, 9]]], "none": [[[1, 4], [0, 7]], [[11], [-1]]]}


def batch(rank, selected):
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[:, :2] = -100
    return dict(input_ids=ids, labels=labels, selected_positions=torch.tensor(SELECTED[selected][rank]))


def num_items(selected):
    """Selected positions of both ranks whose next token carries a loss."""
    positions = torch.cat([torch.tensor(rows).flatten() for rows in SELECTED[selected]])
    return int(((positions >= 1) & (positions < TOKENS - 1)).sum())


def expected_gradients(model, selected):
    for rank in range(RANKS):
        dense_loss(model, **batch(rank, selected), num_items_in_batch=num_items(selected)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def shard(model, mesh, **options):
    for layer in find_decoder(model).layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shard_with_tail(model, mesh, **options):
    """As accelerate does: the final norm and the head, which are used one after the other, are one unit."""
    decoder = find_decoder(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = table.weight is head.weight
    norm = next(child for name, child in decoder.body.named_children() if name.endswith("norm"))
    if not is_tied:
        fully_shard(table, mesh=mesh, **options)
    tail = [norm, table, head] if is_tied else [norm, head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    return shard(model, mesh, **options)


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d" and "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def gradients(model, rank, selected):
    """Full gradients on every rank, and the number of all-gathers in the forward and in the backward pass."""
    with Gathers() as forward:
        loss = model(**batch(rank, selected), num_items_in_batch=num_items(selected)).loss
    with Gathers() as backward:
        (loss * RANKS).backward()  # FSDP divides by the number of ranks
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}, (forward.count, backward.count)


def exact(rank, kind, selected):
    mesh = init_device_mesh("cpu", (RANKS,))
    plain = tiny_model(kind, dtype=torch.float64)
    expected = expected_gradients(copy.deepcopy(plain), selected)
    layers = len(find_decoder(plain).layers)
    found = []
    for sharded_first in (False, True):
        for reshard in (True, False):
            for recompute in (False, True):
                model = copy.deepcopy(plain).train()
                if sharded_first:
                    shard(model, mesh, reshard_after_forward=reshard)
                enable_token_ditching(model, recompute=recompute)
                if not sharded_first:
                    shard(model, mesh, reshard_after_forward=reshard)
                got, gathers = gradients(model, rank, selected)
                assert_close(got, expected)
                # One of the root, which keeps embeddings and head, and one of each layer; the backward pass gathers
                # again what the forward pass has let go.
                found.append((reshard, gathers))
                assert gathers[0] == layers + 1, gathers
                assert gathers[1] == (layers + 1 if reshard else 0), (reshard, gathers)
    return found


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
@pytest.mark.parametrize("selected", SELECTED)
def test_gradients_are_exact_and_layers_gathered_once(kind, selected):
    assert len(spawn(RANKS, exact, kind, selected)) == RANKS


def mixed(rank):
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain = tiny_model("llama").train()
    low = copy.deepcopy(plain)
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    enable_token_ditching(low)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in low.named_parameters()}
    for other in range(RANKS):
        low.zero_grad()
        low(**batch(other, "uneven"), num_items_in_batch=num_items("uneven")).loss.backward()
        for name, parameter in low.named_parameters():
            sums[name] += parameter.grad.float()
    model = shard(enable_token_ditching(plain), mesh, mp_policy=policy)
    got, gathers = gradients(model, rank, "uneven")
    assert gathers[0] == len(find_decoder(model).layers) + 1
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    assert_close(got, sums)


def test_mixed_precision_computes_what_a_bfloat16_model_does():
    spawn(RANKS, mixed)


def in_chunks(rank):
    """The head runs two rows at once: more chunks on rank 0 than on rank 1."""
    tokenseek.decoder.head.CHUNK_BYTES = 4 * VOCAB * 2
    mesh = init_device_mesh("cpu", (RANKS,))
    for kind in ("llama", "llama_tied"):
        plain = tiny_model(kind, dtype=torch.float64)
        expected = expected_gradients(copy.deepcopy(plain), "uneven")
        model = shard_with_tail(enable_token_ditching(copy.deepcopy(plain).train()), mesh)
        for _ in range(2):  # the second step finds what the first has left
            model.zero_grad()
            got, _ = gradients(model, rank, "uneven")
        assert_close(got, expected)


def test_ranks_with_other_numbers_of_chunks():
    spawn(RANKS, in_chunks)
