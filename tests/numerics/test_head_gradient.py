"""A trained head in several chunks: one gradient of its weight, made in the forward pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokenseek
from tokenseek.decoder import head
from tokenseek.decoder.device import planned_for


class MatricesOfTheHead(TorchDispatchMode):
    """Distinct storages of [V, D] that operations return, and the products among them."""

    def __init__(self, known):
        super().__init__()
        self.known = {known.untyped_storage()._cdata}
        self.made, self.products = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_) and any(
            isinstance(x, torch.Tensor) and VOCAB in x.shape for x in tree_leaves((args, result))
        )
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.shape == (VOCAB, 32) and not func.is_view:
                self.made.add(x.untyped_storage()._cdata)
        self.made -= self.known
        return result


def step(model, monkeypatch, rows, autocast=False):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * VOCAB * rows)
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, selected_positions=torch.arange(0, 36, 2)[None]).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "granite"])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_give_what_one_chunk_gives(monkeypatch, kind, autocast):
    model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float32 if autocast else torch.float64))
    whole, chunks = (step(model, monkeypatch, rows, autocast) for rows in (100, 5))
    tolerance = 2e-2 if autocast else 1e-12
    for made, expected in zip(chunks, whole, strict=True):
        assert (made - expected).norm() <= tolerance * expected.norm()


def test_one_matrix_and_three_products_a_chunk(monkeypatch):
    """Of logits, of the hidden states' gradient and of the weight's; checkpointing computes the logits twice."""
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64))
    step(model, monkeypatch, 5)
    model.zero_grad(set_to_none=True)
    with MatricesOfTheHead(model.lm_head.weight) as found:
        ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
        loss = model(input_ids=ids, labels=ids, selected_positions=torch.arange(0, 36, 2)[None]).loss
        assert len(found.made) == 1 and found.products == 3 * 4  # 18 rows in chunks of 5
        loss.backward()
    assert found.products == 3 * 4 and model.lm_head.weight.grad.untyped_storage()._cdata in found.made


@pytest.mark.parametrize("memory,nbytes", [(2**31, 2**26), (2**32, 2**32 // 40), (80 * 2**30, 2**28)])
def test_chunks_by_the_memory_of_a_gpu(monkeypatch, memory, nbytes):
    """As many rows as a fortieth of it holds in float32, between those of a CPU and those of 256 MiB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    vocab = SimpleNamespace(vocab_size=128_256)
    decoder = SimpleNamespace(causal_lm=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: vocab)))
    assert head.rows_per_chunk(decoder, torch.device("cpu")) == 2**26 // (4 * 128_256)
    assert head.rows_per_chunk(decoder, torch.device("cuda", 0)) == nbytes // (4 * 128_256)
    with planned_for("cuda"):
        assert head.rows_per_chunk(decoder, torch.device("cpu")) == 2**28 // (4 * 128_256)
