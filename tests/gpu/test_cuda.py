"""What only a GPU can show: the same gradients and scores from its kernels, in its precisions, and in less memory."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from numerics.dense_reference import dense_loss
from tiny_models import VOCAB, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import enable_token_ditching
from tokenseek.ditching.lanes import CudaLane, lane_of
from tokenseek.models.kernels import apply_liger, compile_regions
from tokenseek.seeking import TokenScorer
from tokenseek.seeking.gradient import _head_chunk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 64
SELECTED = torch.tensor([[1, 4, 5, 11, 40, 63], [0, 7, 20, 33, -1, -1]])
KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def make_batch(lengths=(TOKENS, 48)) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels [B, T]; a prompt of three tokens, padding on the right."""
    ids = torch.randint(3, VOCAB, (len(lengths), TOKENS), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def on_cuda(batch: dict) -> dict:
    return {name: x.cuda() for name, x in batch.items()}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}


def reference(model, batch: dict, selected: torch.Tensor) -> dict[str, torch.Tensor]:
    """The dense reference's gradients in float64, on the CPU."""
    model = copy.deepcopy(model).cpu().double()
    return gradients(model, dense_loss(model, **batch, selected_positions=selected))


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """All gradients together, as one long vector; then each that is not close to zero on its own, more loosely."""
    assert actual.keys() == expected.keys()
    distance = sum((actual[name] - g).norm() ** 2 for name, g in expected.items()).sqrt()
    norm = sum(g.norm() ** 2 for g in expected.values()).sqrt()
    assert distance < tolerance * norm
    for name, gradient in expected.items():
        if gradient.norm() > 1e-2 * norm:
            assert (actual[name] - gradient).norm() < 4 * tolerance * gradient.norm(), name


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_gradients_equal_the_dense_reference(kind, dtype, tolerance, recompute):
    model = tiny_model(kind, dtype=dtype)
    expected = reference(model, make_batch(), SELECTED)
    model = enable_token_ditching(model.cuda(), recompute=recompute)
    loss = model(**on_cuda(make_batch()), selected_positions=SELECTED.cuda()).loss
    assert_close(gradients(model, loss), expected, tolerance)


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize("storage,tolerance", [("host", 1e-10), ("int8", 0.05), ("int8_host", 0.05)])
def test_keys_and_values_put_away(storage, tolerance, recompute):
    model = tiny_model("llama", dtype=torch.float64)
    expected = reference(model, make_batch(), SELECTED)
    model = enable_token_ditching(model.cuda(), recompute=recompute, kv_storage=storage)
    loss = model(**on_cuda(make_batch()), selected_positions=SELECTED.cuda()).loss
    assert_close(gradients(model, loss), expected, tolerance)


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_copies_to_the_host_run_beside_the_work_and_are_exact(recompute):
    """Steps of many layers and changing lengths, in which the allocator hands freed memory on at once."""
    model = tiny_model("llama", num_hidden_layers=12).cuda()
    lane = lane_of(torch.device("cuda", torch.cuda.current_device()))
    copies = []

    def noted(copy, on_device):
        copies.append(on_device.shape)
        return CudaLane.run(lane, copy, on_device)

    for step in range(4):
        ids = torch.randint(3, 90, (1, 3000 + 700 * step), generator=torch.Generator().manual_seed(step)).cuda()
        batch = dict(input_ids=ids, labels=ids, selected_positions=torch.arange(0, ids.shape[1], 40)[None].cuda())
        expected = gradients(enable_token_ditching(model, recompute=recompute), model(**batch).loss)
        expected = {name: gradient.clone() for name, gradient in expected.items()}
        enable_token_ditching(model, recompute=recompute, kv_storage="host")
        with mock.patch.object(lane, "run", noted):
            actual = gradients(model, model(**batch).loss)
        assert_close(actual, expected, 1e-5)
    assert len(copies) == 4 * 12 * 2 * 2 and lane._stream != torch.cuda.current_stream()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("selected", [SELECTED[:1], torch.arange(TOKENS)[None]], ids=["some", "all"])
def test_every_attention_kernel_gives_the_same(kernel, selected):
    batch = {name: x[:1] for name, x in make_batch().items()}
    # The efficient kernel wants a multiple of 8.
    model = tiny_model("llama", dtype=torch.bfloat16, head_dim=64)
    expected = reference(model, batch, selected)
    model = enable_token_ditching(model.cuda())
    try:
        with sdpa_kernel(KERNELS[kernel]):
            loss = model(**on_cuda(batch), selected_positions=selected.cuda()).loss
            actual = gradients(model, loss)
    except RuntimeError as error:
        if not str(error).startswith(("No available kernel", "No viable backend")):
            raise
        pytest.skip(f"this device or version of torch has no {kernel} kernel for these shapes")
    assert_close(actual, expected, 0.1)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.05)], ids=str)
def test_autocast(dtype, tolerance):
    model = tiny_model("llama")
    expected = reference(model, make_batch(), SELECTED)
    model = enable_token_ditching(model.cuda())
    with torch.autocast("cuda", dtype):
        loss = model(**on_cuda(make_batch()), selected_positions=SELECTED.cuda()).loss
    assert_close(gradients(model, loss), expected, tolerance)


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_lora_on_four_bits(recompute):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from benchmarks.methods import build

    name = "tokenseek@0.5+qlora" + ("+recompute" if recompute else "")
    model, loss_of = build(name, "tiny", torch.bfloat16, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # zero at first, which hides the gradient of lora_A
            parameter.data.normal_(0, 0.05, generator=generator)
    batch = dict(input_ids=torch.randint(256, (1, TOKENS), device="cuda"))
    batch |= dict(labels=batch["input_ids"], selected_positions=torch.arange(0, TOKENS, 2, device="cuda")[None])
    actual = gradients(model, loss_of(**batch))
    assert actual and all(g.isfinite().all() and g.any() for g in actual.values())

    from tokenseek.ditching import disable_token_ditching

    causal_lm = disable_token_ditching(model).get_base_model()
    expected = gradients(model, _dense_loss_on_cuda(causal_lm, **batch))
    assert_close(actual, expected, 0.1)


def _dense_loss_on_cuda(model, **batch):
    with torch.device("cuda"):  # the reference makes its own masks
        return dense_loss(model, **batch)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_scores_equal_those_of_the_cpu(kind, dtype, tolerance):
    batch = make_batch()
    model = tiny_model(kind, dtype=dtype)
    expected = TokenScorer(copy.deepcopy(model).float()).score(**batch)
    actual = TokenScorer(model.cuda()).score(**on_cuda(batch))
    for scores, truth in zip(actual, expected, strict=True):
        assert (scores.cpu() - truth).norm() < tolerance * truth.norm()


@pytest.mark.parametrize("vocab", [500, 32000, 128256])  # kernels differ by the length of a row
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_gradient_scores_at_real_vocabularies(vocab, dtype, tolerance):
    """The gradient of the logits is a softmax that is written over its own input."""
    model = tiny_model("llama", vocab_size=vocab).to("cuda", dtype).requires_grad_(False)
    decoder = find_decoder(model)
    output = decoder.body(input_ids=torch.randint(vocab, (1, 300), device="cuda"), use_cache=False)
    hidden, targets = output.last_hidden_state[0].detach(), torch.randint(vocab, (300,), device="cuda")
    leaf = hidden.float().requires_grad_()
    logits = leaf @ model.lm_head.weight.float().T
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    _, _, actual = _head_chunk(decoder, output, hidden, targets, False, False, True)
    assert (actual.float() - leaf.grad).norm() < tolerance * leaf.grad.norm()


def test_selected_tokens_take_less_memory_than_all():
    from benchmarks.step import measure

    options = dict(shape="110m:num_hidden_layers=2", batch=1, dtype="bf16", device="cuda", steps=1)
    full, ours = (measure(name, 512, **options) for name in ("full", "tokenseek@0.1"))
    assert ours["saved"] < 0.25 * full["saved"]
    assert ours["peak"] < full["peak"]


# Last, for they compile for long.


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "phi3"])
def test_ligers_kernels_give_the_same(kind):
    pytest.importorskip("liger_kernel")
    expected = reference(tiny_model(kind), make_batch(), SELECTED)
    model = tiny_model(kind).cuda()
    apply_liger(model)
    loss = enable_token_ditching(model)(**on_cuda(make_batch()), selected_positions=SELECTED.cuda()).loss
    assert_close(gradients(model, loss), expected, 1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_compiled_regions_give_the_same(kind):
    expected = reference(tiny_model(kind), make_batch(), SELECTED)
    model = tiny_model(kind).cuda()
    compile_regions(model)
    loss = enable_token_ditching(model)(**on_cuda(make_batch()), selected_positions=SELECTED.cuda()).loss
    assert_close(gradients(model, loss), expected, 1e-4)
