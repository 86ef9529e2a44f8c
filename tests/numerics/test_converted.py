"""How often a layer's weights are unpacked or cast in a pass, and that nothing but that changes."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import SELECTED, copied, gradients, make_batch
from tiny_models import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokenseek
from benchmarks.memory import LiveStorages
from tokenseek.config import ModelConfig, PeftSettings
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import converted, passes
from tokenseek.models.adapters import add_adapter
from tokenseek.models.kernels import compile_regions
from tokenseek.models.loading import load_model

LINEAR = 7  # layers in a decoder layer: q, k, v, o, gate, up, down
BIASED = PeftSettings(method="lora", r=4, target_modules="all-linear", extra={"init_lora_weights": False})


class Converted(TorchDispatchMode):
    """Counts how often weights in 4 bits are unpacked, and which parameters of `model` are cast."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if ".layers." in name}
        self.unpacked, self.cast = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func._overloadpacket) in ("bitsandbytes.gemm_4bit", "bitsandbytes.dequantize_4bit"):
            self.unpacked += 1
        if func._overloadpacket is torch.ops.aten._to_copy and args[0].data_ptr() in self.names:
            self.cast[self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture
def qlora(folder, monkeypatch):
    """A model in 4 bits with an adapter."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    torch.manual_seed(0)
    return add_adapter(load_model(ModelConfig(name_or_path=str(folder), dtype="float32", quantization="nf4")), BIASED)


def counted(model, autocast=False):
    """What a step converts in its forward pass and in its backward pass."""
    with Converted(model) as ahead, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(**make_batch(), selected_positions=SELECTED).loss
    with Converted(model) as back:
        loss.backward()
    return ahead, back


@contextmanager
def converting_every_time(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(passes, "converted_once", lambda *args, **kwargs: nullcontext())
        yield


def test_weights_in_4_bits_are_unpacked_once_a_pass(qlora, monkeypatch):
    model = tokenseek.enable_token_ditching(qlora.train())
    layers = len(find_decoder(model).layers)
    no_gradient_below = 3  # q, k and v of the first layer
    ahead, back = counted(model)
    assert ahead.unpacked == layers * LINEAR
    assert back.unpacked == layers * LINEAR - no_gradient_below
    expected = copied(gradients(model, model(**make_batch(), selected_positions=SELECTED).loss))
    with converting_every_time(monkeypatch):
        ahead, back = counted(model)
        assert ahead.unpacked > 1.8 * layers * LINEAR and back.unpacked == layers * LINEAR - no_gradient_below
        assert_close(gradients(model, model(**make_batch(), selected_positions=SELECTED).loss), expected)


def test_who_recomputes_holds_none(qlora, monkeypatch):
    """A layer's unpacked weights would be its peak."""
    peaks = []
    model = tokenseek.enable_token_ditching(qlora.train(), recompute=True)
    for context in (nullcontext, lambda: converting_every_time(monkeypatch)):
        with context(), LiveStorages().ignore([*model.parameters(), *model.buffers()]) as live:
            model(**make_batch(), selected_positions=SELECTED).loss.backward()
        model.zero_grad()
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_autocast_casts_a_weight_once_a_pass(recompute, monkeypatch):
    model = tokenseek.enable_token_ditching(tiny_model("qwen2"), recompute=recompute)  # with biases
    linear = {f"{name}.{part}" for name, m in model.named_modules() if ".layers." in name for part in ("weight", "bias")
              if isinstance(m, nn.Linear) and getattr(m, part) is not None}  # fmt: skip
    ahead, back = counted(model, autocast=True)
    assert ahead.cast == Counter(linear)
    assert back.cast == (Counter(linear) if recompute else Counter())
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with converting_every_time(monkeypatch):
        ahead, _ = counted(model, autocast=True)
    assert all(ahead.cast[name] > 1 for name in linear if ".layers.0." in name)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=0, atol=0, msg=name)


def test_a_bias_that_is_trained_has_its_gradient(qlora):
    model = tokenseek.enable_token_ditching(qlora.train())
    layer = find_decoder(model).layers[1].self_attn.o_proj.base_layer
    layer.bias = nn.Parameter(torch.randn(layer.out_features))
    results = []
    for recompute in (False, True):
        tokenseek.enable_token_ditching(model, recompute=recompute)
        results.append(copied(gradients(model, model(**make_batch(), selected_positions=SELECTED).loss)))
    assert_close(*results)
    assert any(name.endswith("o_proj.base_layer.bias") and g.norm() > 0 for name, g in results[0].items())


@pytest.mark.parametrize("kind,recompute", [("4 bits", False), ("autocast", False), ("autocast", True)])
def test_no_more_memory_than_one_layer_of_weights(kind, recompute, qlora, monkeypatch):
    model = qlora.train() if kind == "4 bits" else tiny_model("llama", hidden_size=64, intermediate_size=128)
    tokenseek.enable_token_ditching(model, recompute=recompute)
    of_a_layer = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * (4 if kind == "4 bits" else 2)

    def peak():
        model.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()
        with LiveStorages().ignore([*model.parameters(), *model.buffers()]) as live:
            with autocast:
                loss = model(**make_batch(), selected_positions=SELECTED).loss
            loss.backward()
        return live.peak

    once = peak()
    with converting_every_time(monkeypatch):
        assert once <= peak() + of_a_layer


def test_compiled_regions_are_left_alone():
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    compile_regions(model, backend="eager")
    product = converted._cast_product
    with (
        mock.patch.object(converted, "_cast_product", side_effect=product) as cast,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(**make_batch(), selected_positions=SELECTED).loss.backward()
    seen = {call.args[0] for call in cast.call_args_list}
    layers = find_decoder(model).layers
    assert seen == {m for layer in layers for m in layer.self_attn.modules() if isinstance(m, nn.Linear)}
    assert not any("forward" in m.__dict__ for m in model.modules() if isinstance(m, nn.Linear))
