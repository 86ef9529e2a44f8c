"""Attention of selected rows without a mask of rows times keys, against dense attention in float64."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from numerics.test_ditching import assert_same, make_batch
from tiny_models import computed_in, tiny_model

import tokenseek
from benchmarks.selected_attention import measure
from tokenseek.decoder.device import planned_for
from tokenseek.decoder.masks import MASK_STRIDE, aligned_mask
from tokenseek.ditching import attention
from tokenseek.tiling import kernels, staircase

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture
def small_spans(monkeypatch):
    """Spans of a few rows, as short texts have them."""
    monkeypatch.setitem(staircase.LIMITS, "cpu", staircase.Limits(rows=5, keys=8, fewest=2))


def dense(query, key, value, positions_BS, scale):
    """[B, S, N, H] in float64, with every number of the attention map."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    behind = torch.arange(key.shape[2]) > positions_BS[:, :, None]
    return (scores.masked_fill(behind[:, None], float("-inf")).softmax(-1) @ value).transpose(1, 2)


def inputs(batch, rows, tokens, heads, key_heads, head_dim=16, sharpness=1.0):
    """Queries, keys and values, token-major as the seam makes them, positions, and a gradient of the output."""
    generator = torch.Generator().manual_seed(rows)

    def normal(length, heads):
        made = torch.randn(batch, length, heads, head_dim, dtype=torch.float64, generator=generator)
        return made.transpose(1, 2)

    positions = [torch.randperm(tokens, generator=generator)[:rows].sort().values for _ in range(batch)]
    qkv = [sharpness * normal(rows, heads), normal(tokens, key_heads), normal(tokens, key_heads)]
    return qkv, torch.stack(positions), normal(rows, heads).transpose(1, 2)


def run(attend, qkv, gradient):
    qkv = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in qkv]
    output = attend(*qkv)
    output.backward(gradient.to(output.dtype))
    return [output, *(x.grad for x in qkv)]


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(("output", "query", "key", "value"), actual, expected, strict=True):
        assert (a.double() - e).norm() < tolerance * e.norm(), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads,key_heads", [(4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("batch,rows,tokens", [(1, 40, 120), (2, 33, 90), (1, 30, 30)])
def test_equals_dense_attention(small_spans, batch, rows, tokens, heads, key_heads, dtype):
    qkv, positions, gradient = inputs(batch, rows, tokens, heads, key_heads)
    expected = run(lambda *qkv: dense(*qkv, positions, 0.3), qkv, gradient)
    spans = staircase.make_spans(positions.tolist(), tokens, positions.device, dtype)
    assert len(spans[0]) > 2
    actual = run(lambda *qkv: staircase.staircase_attention(*qkv, spans, 0.3), [x.to(dtype) for x in qkv], gradient)
    assert_close(actual, expected, TOLERANCE[dtype])


def test_large_masks_are_made_as_spans_are_visited(small_spans, monkeypatch):
    """Instead of once for all layers: of all spans one mask is there at a time, and the numbers are the same."""
    qkv, positions, gradient = inputs(2, 33, 90, 4, 2)
    kept = staircase.make_spans(positions.tolist(), 90, positions.device, torch.float64)
    monkeypatch.setattr(staircase, "MOST_KEPT_ENTRIES", 100)
    made = staircase.make_spans(positions.tolist(), 90, positions.device, torch.float64)
    assert {span.known.dim() for spans in kept for span in spans} == {2}
    assert {span.known.dim() for spans in made for span in spans} == {1}
    results = [run(lambda *qkv, s=s: staircase.staircase_attention(*qkv, s, 0.3), qkv, gradient) for s in (kept, made)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sharp_attention(small_spans):
    """Scores of hundreds: one part of a row's softmax is nothing beside the other, and its log-sum-exp far away."""
    qkv, positions, gradient = inputs(1, 40, 120, 4, 2, sharpness=300)
    expected = run(lambda *qkv: dense(*qkv, positions, 1.0), qkv, gradient)
    spans = staircase.make_spans(positions.tolist(), 120, positions.device, torch.float64)
    actual = run(lambda *qkv: staircase.staircase_attention(*qkv, spans, 1.0), qkv, gradient)
    assert all(x.isfinite().all() for x in actual)
    assert_close(actual, expected, 1e-11)


def test_examples_with_fewer_rows(small_spans):
    """What fills an example up gets zeros and gives no gradient, whatever its gradient is."""
    qkv, positions, gradient = inputs(3, 20, 60, 4, 2)
    kept = [20, 7, 0]
    spans = staircase.make_spans(
        [row[:n] for row, n in zip(positions.tolist(), kept, strict=True)], 60, positions.device, torch.float64
    )
    is_kept = (torch.arange(20) < torch.tensor(kept)[:, None])[:, :, None, None]
    expected = run(lambda *qkv: dense(*qkv, positions, 0.25) * is_kept, qkv, gradient)
    actual = run(lambda *qkv: staircase.staircase_attention(*qkv, spans), qkv, gradient)
    assert_close(actual, expected, 1e-14)


def test_few_rows_keep_the_masked_call():
    device = torch.device("cpu")
    limits = staircase.LIMITS["cpu"]
    enough = limits.rows * limits.fewest
    positions = list(range(0, 8 * enough, 8))
    assert staircase.make_spans([positions], 8 * enough, device, torch.float32)
    assert staircase.make_spans([positions[1:]], 8 * enough, device, torch.float32) is None
    assert staircase.make_spans([positions], limits.fewest * limits.keys - 1, device, torch.float32) is None
    assert staircase.make_spans([positions], 8 * enough, torch.device("meta"), torch.float32) is None


@pytest.mark.parametrize("lengths", [(120,), (120, 90)])
@pytest.mark.parametrize("recompute,kv_storage", [(False, "device"), (True, "device"), (False, "host")])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "gemma3", "smollm3"])
def test_models(small_spans, kind, lengths, recompute, kv_storage):
    """In whole models, of which gemma3 has windows in every second layer."""
    batch = make_batch(lengths)
    generators = [(n, torch.Generator().manual_seed(n)) for n in lengths]
    positions = [torch.randperm(n, generator=g)[: n // 2].sort().values for n, g in generators]
    selected = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True, padding_value=-1)
    model = tiny_model(kind, dtype=torch.float64)
    model = tokenseek.enable_token_ditching(model, recompute=recompute, kv_storage=kv_storage)
    with mock.patch.object(staircase, "staircase_attention", wraps=staircase.staircase_attention) as used:
        assert_same(model, batch, selected, computed_in(kind))
    # Unselected rows use it where there is a window; those of the last layer do not attend.
    assert used.call_count == 4 * (1 + recompute) + (kind == "gemma3")


def test_packed_examples(small_spans):
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (1, 100), generator=generator)
    position_ids = torch.cat([torch.arange(60), torch.arange(40)])[None]
    selected = torch.randperm(100, generator=generator)[:50].sort().values[None]
    labels = ids.masked_fill(position_ids == 0, -100)
    batch = dict(input_ids=ids, position_ids=position_ids, labels=labels, selected_positions=selected)

    def losses_and_gradients():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    with mock.patch.object(staircase, "staircase_attention", wraps=staircase.staircase_attention) as used:
        actual = losses_and_gradients()
    assert used.call_count == 2 * 4  # both examples, in every layer
    with mock.patch.object(attention, "make_spans", return_value=None):
        expected = losses_and_gradients()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-13)


def test_autocast(small_spans):
    """Queries and keys may come in float32 from rotary embeddings where values come in bfloat16."""
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    batch = make_batch((120,))
    selected = torch.arange(0, 120, 2)[None]
    exact = model(**batch, selected_positions=selected).loss
    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch.object(staircase, "staircase_attention", wraps=staircase.staircase_attention) as used,
    ):
        loss = model(**batch, selected_positions=selected).loss
    loss.backward()
    assert {x.dtype for call in used.call_args_list for x in call.args[:3]} == {torch.bfloat16}
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


class TestCudaKernels:
    """The calls of a GPU's kernels, by stand-ins that compute what those do, with their layouts."""

    @staticmethod
    def reference(query, key, value, bias, scale):
        scores = query.double() @ key.double().transpose(-1, -2) * scale
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)

    @classmethod
    def gradients(cls, grad, query, key, value, bias, out, lse, scale):
        scores = query.double() @ key.double().transpose(-1, -2) * scale
        p = (scores if bias is None else scores + bias).sub(lse[..., None]).exp()
        ds = p * (grad.double() @ value.double().transpose(-1, -2) - (grad.double() * out).sum(-1, keepdim=True))
        return scale * ds @ key.double(), scale * ds.transpose(-1, -2) @ query.double(), p.transpose(-1, -2) @ grad

    class Aten:
        calls = []

        @classmethod
        def _scaled_dot_product_flash_attention(cls, query, key, value, *, scale):
            cls.calls.append("flash")
            out, lse = TestCudaKernels.reference(query, key, value, None, scale)
            return out.transpose(1, 2).contiguous().transpose(1, 2), lse, None, None, *query.shape[2:3], 0, None

        @classmethod
        def _scaled_dot_product_flash_attention_backward(
            cls, grad, query, key, value, out, lse, cum_q, cum_k, rows, keys, dropout, causal, seed, offset, *, scale
        ):
            assert lse.is_contiguous() and (rows, keys) == (query.shape[2], key.shape[2])
            assert (dropout, causal, cum_q, cum_k) == (0.0, False, None, None)
            assert seed.dtype == offset.dtype == torch.uint64
            return TestCudaKernels.gradients(grad, query, key, value, None, out, lse, scale)

        @classmethod
        def _scaled_dot_product_efficient_attention(cls, query, key, value, bias, with_lse, *, scale):
            cls.calls.append("efficient")
            assert with_lse
            assert bias is None or (bias.shape == (*query.shape[:3], key.shape[2]) and bias.stride(2) % 16 == 0)
            out, lse = TestCudaKernels.reference(query, key, value, bias, scale)
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
            return out, lse, None, None

        @classmethod
        def _scaled_dot_product_efficient_attention_backward(
            cls, grad, query, key, value, bias, out, lse, seed, offset, dropout, wanted, *, scale
        ):
            rows = query.shape[2]
            assert lse.shape[2] % 32 == 0 and lse[:, :, rows:].isinf().all() and dropout == 0.0
            assert wanted == [True, True, True, False]
            assert bias is None or bias.stride(2) % 16 == 0
            return *TestCudaKernels.gradients(grad, query, key, value, bias, out, lse[:, :, :rows], scale), None

    @pytest.mark.parametrize("far", ["_CudaFlash", "_CudaEfficient"])
    def test_equal_dense_attention(self, small_spans, monkeypatch, far):
        self.Aten.calls.clear()
        qkv, positions, gradient = inputs(2, 33, 90, 4, 2)
        expected = run(lambda *qkv: dense(*qkv, positions, 0.3), qkv, gradient)
        spans = staircase.make_spans(positions.tolist(), 90, positions.device, torch.float64)
        pair = getattr(kernels, far), kernels._CudaEfficient
        monkeypatch.setattr(kernels, "_kernels", lambda query: pair)
        monkeypatch.setattr(kernels, "_aten", self.Aten)
        actual = run(lambda *qkv: staircase.staircase_attention(*qkv, spans, 0.3), qkv, gradient)
        assert_close(actual, expected, 1e-14)
        assert ("flash" in self.Aten.calls) == (far == "_CudaFlash")

    @pytest.mark.parametrize("kernel", ["_CudaFlash", "_CudaEfficient"])
    def test_signatures(self, kernel):
        """The real operators, on tensors without data."""
        with torch.device("meta"):
            query, key = torch.empty(40, 2, 3, 64, dtype=torch.bfloat16).permute(1, 2, 0, 3), torch.empty(2, 50, 64)
            key = key.bfloat16()
            mask = None if kernel == "_CudaFlash" else aligned_mask(torch.ones(40, 50, dtype=torch.bool), key.dtype)
        kernel = getattr(kernels, kernel)
        out, lse = kernel.forward(query, key, key, mask, 0.125)
        assert out.shape == query.shape and lse.shape == query.shape[:3]
        sums = [torch.zeros_like(x) for x in (query, key, key)]
        kernel.add_gradients(*sums, out, query, out, lse, key, key, mask, 0.125)  # raises where a shape does not fit

    @pytest.mark.parametrize(
        "dtype,head_dim,capability,pair",
        [
            (torch.bfloat16, 128, (9, 0), ("_CudaFlash", "_CudaEfficient")),
            (torch.float16, 80, (8, 0), ("_CudaFlash", "_CudaEfficient")),
            (torch.bfloat16, 256, (9, 0), ("_CudaEfficient", "_CudaEfficient")),
            (torch.bfloat16, 64, (7, 5), ("_CudaEfficient", "_CudaEfficient")),
            (torch.float32, 64, (9, 0), ("_CudaEfficient", "_CudaEfficient")),
            (torch.float64, 64, (9, 0), None),
            (torch.bfloat16, 60, (9, 0), None),
        ],
    )
    def test_which_kernels(self, monkeypatch, dtype, head_dim, capability, pair):
        """Where there are none, attention goes its old way, through the function of the model's backend."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        query = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 2, 3, head_dim))
        found = kernels._kernels(query)
        assert (found and tuple(kernel.__name__ for kernel in found)) == pair
        assert kernels.is_served(query, query, query) == (pair is not None)


class TestMasks:
    @pytest.mark.parametrize("keys", [1, 15, 16, 33])
    @pytest.mark.parametrize("repeats", [1, 3])
    def test_rows_begin_at_multiples_of_the_stride(self, keys, repeats):
        generator = torch.Generator().manual_seed(keys)
        seen = torch.rand(2, 1, 5, keys, generator=generator) < 0.5
        mask = aligned_mask(seen, torch.float32, repeats)
        assert mask.shape == (2, 1, repeats * 5, keys) and mask.stride(-2) % MASK_STRIDE == 0
        assert torch.equal(mask == 0, seen.repeat(1, 1, repeats, 1)) and torch.equal(mask.isinf(), mask < 0)

    @pytest.mark.parametrize("lengths", [(61,), (61, 40)])
    def test_selected_rows_have_such_masks_alone(self, monkeypatch, lengths):
        """In every call of the backend's kernels: autograd would keep the copy that a kernel makes, layer by layer."""
        strides, original = [], torch.nn.functional.scaled_dot_product_attention

        def spied(query, key, value, attn_mask=None, **kwargs):
            strides.extend([] if attn_mask is None else [attn_mask.stride(-2)])
            return original(query, key, value, attn_mask=attn_mask, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
        model = tokenseek.enable_token_ditching(tiny_model("llama"))
        model(**make_batch(lengths), selected_positions=torch.arange(0, 39, 2).expand(len(lengths), -1)).loss.backward()
        assert strides and not any(stride % MASK_STRIDE for stride in strides)

    def test_numbers_stay(self):
        numbers = torch.randn(1, 1, 4, 7)
        assert torch.equal(aligned_mask(numbers, torch.float32, 2), numbers.repeat(1, 1, 2, 1))

    @pytest.mark.parametrize("limit", [1, 300, 5000])
    @pytest.mark.parametrize("kind", ["llama", "mistral"])
    def test_no_kernel_gets_more_entries_than_it_can_count(self, monkeypatch, kind, limit):
        """Both passes of a model with windows (mistral) whose masks are made, the selected pass of one without."""
        monkeypatch.setattr(attention, "MOST_MASK_ENTRIES", limit)
        monkeypatch.setattr("tokenseek.ditching.reach.takes_windows", lambda decoder: False)
        model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64))
        batch, sizes = make_batch((60, 41)), []
        original = torch.nn.functional.scaled_dot_product_attention

        def spied(query, key, value, attn_mask=None, **kwargs):
            if attn_mask is not None:
                sizes.append((attn_mask.numel(), attn_mask.numel() // attn_mask.shape[2]))
            return original(query, key, value, attn_mask=attn_mask, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
        assert_same(model, batch, torch.arange(0, 41, 2).expand(2, -1).contiguous())
        # The dense reference's calls, of a query for every key, come first.
        ours = [(entries, per_row) for entries, per_row in sizes if entries != 2 * 60 * 60]
        assert ours and all(entries <= max(limit, 2 * per_row) for entries, per_row in ours)


def test_memory_is_linear_in_tokens():
    """The bar at T = 8192 (5 % of the mask) is benchmarks/selected_attention.py's; a pass of it takes seconds."""
    masked, stairs = (measure(method, 4096, 0.1, repeats=1, heads=4, key_heads=1) for method in ("masked", "staircase"))
    assert stairs["mask"] < 0.04 * masked["mask"]
    assert stairs["extra"] < 0.1 * masked["extra"]
    twice = measure("staircase", 8192, 0.1, repeats=1, heads=4, key_heads=1)
    assert twice["extra"] < 2.3 * stairs["extra"]


def test_a_gpu_gets_no_span_of_few_rows():
    """Whatever is selected; nor one mask of many rows and all keys, where two spans have rows enough."""
    with planned_for("cuda"):
        for rows in (500, 512, 1300, 20000):
            spans = staircase.make_spans([list(range(0, 8 * rows, 8))], 8 * rows, torch.device("cpu"), torch.bfloat16)
            assert (spans is None) == (rows < 512)
            assert all(span.last - span.first >= 256 for of_example in spans or () for span in of_example)


def test_large_rows_have_few_spans():
    spans = staircase.make_spans([list(range(20000))], 20000, torch.device("cpu"), torch.float32)
    assert len(spans[0]) == staircase.LIMITS["cpu"].most
