"""Plans by a few layers of a deep model are those of all its layers."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

import benchmarks.plan
from benchmarks.plan import DRAWN, LORA, model_config
from tokenseek.ditching.loss import EveryChunk
from tokenseek.planning import Engine, Gpu, Method, find_shape, plan_memory
from tokenseek.planning.depth import depths_that_tell

SIZES = dict(hidden=64, layers=10, vocab=500, tokens=96)
LLAMA = model_config("llama", **SIZES)
SHORT = model_config("llama", **{**SIZES, "layers": 8})
WINDOWS = AutoConfig.for_model(
    "qwen3", vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=16, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=32, use_sliding_window=True, max_position_embeddings=96,
    layer_types=["full_attention", "sliding_attention"] * 8, pad_token_id=0,
)  # fmt: skip
GPU = Gpu(1e12, 1e11, 1e10, 1e9)
ACCUMULATED = ("training.gradient_accumulation_steps=2",)
ONLINE = ("scoring.mode=online", "scoring.reduction=l2", *DRAWN)


def run_config(*settings: str):
    return benchmarks.plan.run_config(SIZES["tokens"], *settings)


CASES = [(SHORT, Method(recompute=True, chunked_loss=True, offload=True), Engine(), LORA)]
SLOW_CASES = [
    (LLAMA, Method(0.2), Engine(), (*ONLINE, "selection.exact_layers=1")),
    (WINDOWS, Method(0.2, recompute=True), Engine(), LORA),
    (SHORT, Method(0.2, recompute=True), Engine("zero3", 4, reduce_bucket=1000), ()),
    (SHORT, Method(), Engine(), ()),
    (SHORT, Method(0.2), Engine(), LORA),
    (SHORT, Method(0.2), Engine(), ("training.optim=adamw_torch", *ACCUMULATED)),
    (SHORT, Method(0.2, recompute=True, kv_storage="host"), Engine(), LORA),
    (SHORT, Method(0.2), Engine("zero2", 4, reduce_bucket=1000), ACCUMULATED),
    (SHORT, Method(), Engine("fsdp2", 4), ("training.mixed_precision=bf16",)),
    (SHORT, Method(0.2), Engine("ddp", 4, sp_size=2), LORA),
    (SHORT, Method(0.2), Engine(), (*ONLINE, *LORA)),
]


@pytest.mark.parametrize(
    "shape, method, engine, settings", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_a_few_layers_tell_of_all(shape, method, engine, settings):
    config = run_config(*settings)
    assert depths_that_tell(config, engine, shape)
    whole = plan_memory(config, method, engine, model_config=shape, every_layer=True)
    quick = plan_memory(config, method, engine, model_config=shape)
    assert (quick.peak, quick.parts, quick.states, quick.host) == (whole.peak, whole.parts, whole.states, whole.host)
    for one, other in zip(quick.stretches, whole.stretches, strict=True):
        assert (one.name, one.peak, one.parts) == (other.name, other.peak, other.parts)
    assert quick.average == pytest.approx(whole.average, rel=0.01)
    assert (quick.work.flops, quick.work.sent) == (whole.work.flops, whole.work.sent)
    assert quick.work.seconds(GPU) == pytest.approx(whole.work.seconds(GPU), rel=1e-9)


def test_where_layers_differ_all_of_them_are_run():
    config = run_config()
    for changed in (dict(num_hidden_layers=6), dict(no_rope_layer_interval=10), dict(no_rope_layers=[1] * 5 + [0] * 5)):
        kind = "llama" if "num_hidden_layers" in changed else "smollm3"
        values = dict(num_hidden_layers=10, hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=500)
        shape = AutoConfig.for_model(kind, **(values | changed), pad_token_id=0)
        assert depths_that_tell(config, Engine(), shape) is None
    adapter = run_config(*LORA, "peft.extra={layers_to_transform: [3, 7]}")
    assert depths_that_tell(adapter, Engine(), LLAMA) is None
    buckets = Engine("zero2", 2, reduce_bucket=10**9)
    assert depths_that_tell(config, buckets, LLAMA) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "gemma-2-9b", "gpt-oss-20b", "smollm3-3b"])
def test_public_models(name):
    attention = "eager" if name in ("gemma-2-9b", "gpt-oss-20b") else "sdpa"
    settings = ("model.dtype=bfloat16", f"model.attn_implementation={attention}")
    if name == "gpt-oss-20b":  # whose experts are no linear layers
        settings += ("peft.target_modules=[q_proj,v_proj]",)
    config = benchmarks.plan.run_config(2048, *LORA, *settings)
    shape = find_shape(name).config()
    for method in (Method(recompute=True), Method(0.1)):
        whole = plan_memory(config, method, model_config=shape, every_layer=True)
        quick = plan_memory(config, method, model_config=shape)
        assert (quick.peak, quick.parts) == (whole.peak, whole.parts)


def test_a_few_chunks_of_the_head_tell_of_all(monkeypatch):
    config = run_config(*LORA)
    method = Method(recompute=True, chunked_loss=True)
    monkeypatch.setattr("tokenseek.decoder.head.MOST_CHUNK_BYTES", 4 * 500 * 8)  # 8 of 96 rows
    quick = plan_memory(config, method, model_config=LLAMA)
    monkeypatch.setattr("tokenseek.planning.fake.FewChunks", lambda work: EveryChunk())
    whole = plan_memory(config, method, model_config=LLAMA)
    assert quick.work.flops == whole.work.flops
    assert quick.peak == pytest.approx(whole.peak, rel=1e-4)
    assert quick.average == pytest.approx(whole.average, rel=0.01)
    assert quick.work.seconds(GPU) == pytest.approx(whole.work.seconds(GPU), rel=0.01)


@pytest.mark.slow
def test_some_spans_and_tiles_tell_of_all(monkeypatch):
    config = run_config(*LORA)
    shape = model_config("llama", hidden=64, layers=2, vocab=500, tokens=8192)
    method = Method(0.3, recompute=True)
    some = plan_memory(config, method, model_config=shape, tokens=8192)
    monkeypatch.setattr("tokenseek.planning.fake.some_of", lambda work, parts: iter(parts))
    every = plan_memory(config, method, model_config=shape, tokens=8192)
    assert some.peak == pytest.approx(every.peak, rel=1e-3)
    assert some.work.flops == pytest.approx(every.work.flops, rel=1e-3)
