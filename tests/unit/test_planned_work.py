"""What a planned step computes, launches and sends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from unit.test_planning import CPU, LLAMA, run_config

from benchmarks.launches import measure as measure_launches
from benchmarks.plan import LORA
from benchmarks.shapes import model_config as shape_of
from tokenseek.planning import EFFICIENCY, Engine, Gpu, Method, StepWork, plan_memory
from tokenseek.planning.work import Work


def test_time_is_that_of_the_arithmetic_or_of_the_traffic():
    gpu = Gpu(flops=100.0, flops_float32=10.0, bandwidth=1.0, link=5.0)
    with Work() as work:
        a, b = torch.ones(8, 16), torch.ones(16, 4)
        work.reset()
        (a @ b).view(4, 8).t()  # views take no time
        torch.empty(1000)  # nor does memory that nobody writes
    assert work.flops == 2 * 8 * 16 * 4
    step = StepWork(work.flops, 30, work.operations)
    with Work() as in_place:
        torch._foreach_mul_([a, b], 2)
    assert list(in_place.operations) == [(0, 2 * 4 * (8 * 16 + 16 * 4), True)]
    moved = 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert step.seconds(gpu) == pytest.approx(max(work.flops / 10, moved) / EFFICIENCY)
    assert step.launches == 1
    for launch, seconds in ((0.0, step.seconds(gpu)), (1e6, 1e6)):
        assert step.step_seconds(replace(gpu, launch=launch)) == pytest.approx(seconds)
    assert step.sending_seconds(gpu) == pytest.approx(30 / 5 / EFFICIENCY)
    assert replace(step, operations=Counter({(400.0, 3, False): 2})).seconds(gpu) == pytest.approx(8 / EFFICIENCY)


def test_causal_attention_takes_half_the_time_and_rows_of_a_table_their_own():
    q = torch.ones(1, 2, 64, 16)
    counts = []
    for causal in (False, True):
        with Work() as work:
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)
        ((arithmetic, _, _),) = [key for key in work.operations if key[0]]
        counts.append((work.flops, arithmetic))
    flops = 4 * 2 * 64 * 64 * 16
    assert counts == [(flops, flops), (flops, flops / 2)]
    table, ids = torch.ones(1000, 16), torch.tensor([1, 5])
    with Work() as work:
        torch.nn.functional.embedding(ids, table)
    assert list(work.operations) == [(0, 2 * 2 * 16 * 4, True)]


def test_launches_are_those_that_are_counted_in_a_real_step():
    """Of a layer to the last one, though the host's own questions differ; a fused optimizer is one."""
    config = run_config()
    shapes = [shape_of(f"tiny:num_hidden_layers={layers}") for layers in (3, 4)]
    for method, name in ((Method(), "full"), (Method(0.1), "index"), (Method(0.1, recompute=True), "index+recompute")):
        few, many = (
            plan_memory(config, method, Engine(), tokens=128, model_config=shape, every_layer=True).work.launches
            for shape in shapes
        )
        counted = measure_launches(name, repeats=1)
        fixed = counted["forward_fixed"] + counted["backward_fixed"]
        assert many - few == pytest.approx(counted["layer"], rel=0.06), name
        assert many - 4 * (many - few) == pytest.approx(fixed, abs=25), name


def test_a_fused_optimizer_reads_and_writes_once():
    config, trained = run_config(), AutoModelForCausalLM.from_config(LLAMA).num_parameters()
    fused, looped = (plan_memory(config, Method(0.25), engine, model_config=LLAMA).work for engine in (Engine(), CPU))
    (nbytes,) = [key[1] for key in fused.operations if key[1] > 6 * 4 * trained]
    assert nbytes == pytest.approx(7 * 4 * trained, rel=1e-4)  # weights and two moments both ways, and gradients
    tensors = len(list(AutoModelForCausalLM.from_config(LLAMA).parameters()))
    assert looped.launches - fused.launches > 8 * tensors


def test_what_is_sent():
    """Against arithmetic: W bytes of weights, all trained, over 4 processes, in 2 micro batches."""
    weights = 2 * AutoModelForCausalLM.from_config(LLAMA).num_parameters()
    config = run_config("model.dtype=bfloat16", "training.gradient_accumulation_steps=2")
    expected = {"single": 0, "ddp": 2, "zero1": 2, "zero2": 3, "zero3": 6, "fsdp2": 6}
    for kind, times in expected.items():
        processes = 1 if kind == "single" else 4
        work = plan_memory(config, Method(0.25), Engine(kind, processes), model_config=LLAMA).work
        assert work.sent == times * weights * 3 // 4, kind
    lora = run_config(*LORA, "model.dtype=bfloat16")
    sent = plan_memory(lora, Method(0.25), Engine("ddp", 4), model_config=LLAMA).work.sent
    adapters = 2 * 3 * 8 * (128 + 384)  # layers, matrices of a feed-forward block, rank, both sides; in float32
    assert sent == 2 * 4 * adapters * 3 // 4
