"""Keys and values that lie as the passes leave them, not in the order of the text."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from numerics.test_ditching import assert_same, make_batch
from tiny_models import computed_in, tiny_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tokenseek
from benchmarks.launches import Launches
from benchmarks.models import batch_of, tiny
from tokenseek.ditching.attention import selected_attention, unselected_attention
from tokenseek.ditching.rows import partition
from tokenseek.ditching.side_by_side import SideBySide

SELECTED = [1, 4, 5, 9]  # of 13: the tokens behind the last are in no pass


@pytest.fixture
def joins():
    """How often keys and values were joined side by side."""
    with mock.patch.object(SideBySide, "join", autospec=True, side_effect=SideBySide.join) as join:
        yield join


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize("selected", [SELECTED, [0, 6, 12], [0, 1, 2]], ids=["some", "ends", "all before"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmo2", "gemma3", "qwen3_moe"])
def test_loss_and_gradients(kind, selected, recompute, joins, uninitialized_is_nan):
    model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64), recompute=recompute)
    assert_same(model, make_batch((13,)), torch.tensor([selected]), computed_in(kind))
    without_window = 2 if kind == "gemma3" else 4
    assert joins.call_count == without_window * (1 + recompute)


def test_a_cache_of_latents_that_attention_makes_keys_of(joins):
    """DeepSeek's; those of keys have another width than those of values."""
    model = tokenseek.enable_token_ditching(tiny("deepseek_v3").double())
    batch = batch_of()
    assert_same(model, batch | dict(labels=batch["input_ids"]), torch.tensor([[1, 4, 5, 9]]), torch.float32)
    assert joins.called


@pytest.mark.parametrize(
    "options,kind,lengths",
    [
        (dict(kv_storage="host"), "llama", (13,)),
        (dict(tile_rows=2), "llama", (13,)),
        (dict(), "llama", (13, 13)),
        (dict(), "llama", (13, 9)),
        (dict(), "mistral", (13,)),
        (dict(), "gemma4", (13,)),
        (dict(attn="eager"), "llama", (13,)),
    ],
    ids=str,
)
def test_who_needs_the_order_of_the_text_has_it(options, kind, lengths, joins):
    options = dict(options)
    model = tiny_model(kind, attn=options.pop("attn", "sdpa"))
    model = tokenseek.enable_token_ditching(model, **options)
    model(**make_batch(lengths), selected_positions=torch.tensor([SELECTED] * len(lengths))[:, :3]).loss.backward()
    assert not joins.called


def test_many_rows_keep_the_order_of_the_text():
    assert SideBySide.of(partition(torch.arange(0, 128, 2)[None], None, 128)) is None
    assert SideBySide.of(partition(torch.arange(0, 30, 2)[None], None, 128)) is not None


class Layer:
    """Queries of both passes, and keys and values of both joined and in the order of the text."""

    def __init__(self, value_dim=8, queries=4, heads=2, tokens=13):
        generator = torch.Generator().manual_seed(0)
        self.parts = partition(torch.tensor([SELECTED]), None, tokens)
        self.order = SideBySide.of(self.parts)
        text = self.order.keys
        assert text == SELECTED[-1] + 1

        def random(n, dim):
            return torch.randn(1, n, text, dim, generator=generator, dtype=torch.float64)

        self.keys, self.values = random(heads, 8), random(heads, value_dim)
        rows = self.parts.unselected, self.parts.selected
        queries = random(queries, 8)
        self.unselected, self.selected = (queries.index_select(2, r.index_BR[0]) for r in rows)
        self.queries = queries
        own = [[x.index_select(2, r.index_BR[0]) for x in (self.keys, self.values)] for r in rows]
        self.leaves = [x.requires_grad_() for x in own[1]]
        self.joined = self.order.join(tuple(own[0]), *self.leaves)


@pytest.mark.parametrize("value_dim", [8, 6])
def test_joined_and_put_in_order(value_dim):
    layer = Layer(value_dim)
    with Launches() as launches:
        keys, values = layer.order.in_text_order(*layer.joined)
    torch.testing.assert_close((keys, values), (layer.keys, layer.values), rtol=0, atol=0)
    assert launches.operations["index_select"] == (1 if value_dim == 8 else 2)
    joined = torch.cat([layer.parts.unselected.index_BR, layer.parts.selected.index_BR], 1)[0]
    torch.testing.assert_close(layer.joined[1], layer.values.index_select(2, joined), rtol=0, atol=0)


def test_the_gradient_of_selected_rows_is_a_stretch_and_no_copy():
    layer = Layer()
    weights = torch.randn(1, 2, 10, 8, dtype=torch.float64)
    given = [weights, 2 * weights]
    with Launches() as launches:
        grads = torch.autograd.grad(layer.joined, layer.leaves, given)
    torch.testing.assert_close(grads, tuple(x[:, :, 6:] for x in given), rtol=0, atol=0)
    assert launches.count == 0


@pytest.mark.parametrize("bias", ["none", "position_bias", "mask"])
def test_what_a_layer_makes_for_its_keys_is_in_the_order_of_the_text(bias):
    """A bias, or a mask, from a layer that knows nothing of passes: its columns are the tokens of the text."""
    layer = Layer()
    text = layer.order.keys
    column = torch.linspace(-1, 1, text, dtype=torch.float64)
    index_S = layer.parts.selected.index_BR[0]
    causal = torch.arange(text) <= torch.arange(text)[:, None]
    whole = torch.zeros(text, text, dtype=torch.float64).masked_fill(~causal, float("-inf"))
    module = type("Attention", (), dict(num_key_value_groups=2, is_causal=True))()
    given = {}
    mask = None
    if bias == "position_bias":
        whole, given = whole + column, dict(position_bias=column.expand(1, 1, len(index_S), text))
    elif bias == "mask":
        whole = whole + column
        mask = whole[index_S][None, None]
    expected, _ = sdpa_attention_forward(module, layer.queries, layer.keys, layer.values, whole[None, None])
    calls = []
    attend = selected_attention(layer.parts.selected, lambda: calls.append(1), layer.order)(sdpa_attention_forward)
    output, _ = attend(module, layer.selected, *layer.joined, mask, **given)
    torch.testing.assert_close(output, expected[:, index_S])
    assert len(calls) == 1
    rows = layer.parts.unselected
    attend = unselected_attention(rows, lambda: calls.append(1))(sdpa_attention_forward)
    output, _ = attend(module, layer.unselected, *layer.order.in_text_order(*layer.joined), None)
    expected, _ = sdpa_attention_forward(module, layer.queries, layer.keys, layer.values, None)
    torch.testing.assert_close(output, expected[:, rows.index_BR[0]])
    assert len(calls) == 2
