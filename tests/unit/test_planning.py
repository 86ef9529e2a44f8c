"""The planner against real training steps, whose storages another counter follows; engines, budgets, the command."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import benchmarks.plan
from benchmarks.plan import (
    CASES,
    LORA,
    measured_flops,
    measured_peak,
    model_config,
)
from tokenseek.cli import main
from tokenseek.config import load_config
from tokenseek.errors import UserError
from tokenseek.models.loading import load_model
from tokenseek.planning import (
    CATEGORIES,
    Engine,
    Method,
    find_shape,
    largest_ratio,
    plan_memory,
    read_engine,
)
from tokenseek.planning.packed import packed_bytes, scale_bytes

SIZES = dict(hidden=128, layers=2, vocab=1000, tokens=384)
LLAMA = model_config("llama", **SIZES)
CPU = Engine(on_cpu=True)


def run_config(*settings: str):
    return benchmarks.plan.run_config(SIZES["tokens"], *settings)


@pytest.mark.parametrize("case", CASES)
def test_plan_agrees_with_a_real_step(case):
    kind, method, settings = CASES[case]
    config, shape = run_config(*settings), model_config(kind, **SIZES)
    planned = plan_memory(config, method, CPU, model_config=shape)
    measured = measured_peak(config, method, shape)
    assert planned.peak == pytest.approx(measured, rel=0.03)
    # Weights and their states, which are easily counted, must not hide an error in the rest.
    assert planned.peak - planned.states == pytest.approx(measured - planned.states, rel=0.05)
    assert sum(planned.parts.values()) == planned.peak
    # Where the selected tokens stand decides how many keys they see: evenly spread in the plan, drawn in the step.
    tolerance = 1e-9 if method.ratio is None else 0.02
    assert planned.work.flops == pytest.approx(measured_flops(config, method, shape), rel=tolerance)


def test_plan_agrees_with_a_real_step_of_windows(monkeypatch):
    """Of four tokens each, evenly spread as a plan has the selected ones: most keys and values are not kept."""

    def inputs(batch: int, tokens: int, vocab: int, ratio: float) -> dict[str, torch.Tensor]:
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        count = round(ratio * tokens)
        positions = torch.arange(1, count + 1) * tokens // count - 1
        return dict(input_ids=ids, labels=ids, selected_positions=positions[None], num_items_in_batch=ids.numel())

    monkeypatch.setattr(benchmarks.plan, "_inputs", inputs)
    shape, method = model_config("mistral", **SIZES | {"layers": 6}), Method(0.1, recompute=True)
    held = []
    for window in (4, 400):
        shape.sliding_window = window
        config = run_config(*LORA)
        planned = plan_memory(config, method, CPU, model_config=shape)
        assert planned.peak == pytest.approx(measured_peak(config, method, shape), rel=0.03)
        held.append(next(stretch.peak for stretch in planned.stretches if stretch.name == "head"))
    unselected, layers, per_token = 346, 6, 2 * 64 * 4  # bytes of the keys and values of a token in a layer
    assert held[1] - held[0] > 0.4 * unselected * layers * per_token, held


@pytest.mark.parametrize("quantization", ["nf4", "nf4, double", "int8"])
def test_packed_weights_take_the_bytes_of_bitsandbytes(tmp_path, monkeypatch, quantization):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32).save_pretrained(tmp_path)
    kind, _, double = quantization.partition(", ")
    overrides = [f"model.quantization={kind}", f"model.double_quantization={str(bool(double)).lower()}"]
    config = run_config(*LORA, *overrides, f"model.name_or_path={tmp_path}")
    layer = load_model(config.model).model.layers[0].mlp.up_proj
    if kind == "int8":
        scales = layer.weight.SCB.nbytes
    else:
        state = layer.weight.quant_state
        scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    linear = torch.nn.Linear(layer.in_features, layer.out_features)
    assert packed_bytes(linear, config.model) == layer.weight.nbytes
    assert scale_bytes(linear, config.model) == scales


@pytest.mark.parametrize("double", [False, True])
def test_engines_split_packed_weights_and_not_their_scales(double):
    """Against arithmetic: half a byte a weight of a layer's, 4 bytes for 64 of them or 1 and 4 for 256 of those."""
    config = run_config(
        *LORA, "model.quantization=nf4", f"model.double_quantization={str(double).lower()}", "model.dtype=bfloat16"
    )
    model = AutoModelForCausalLM.from_config(LLAMA)
    linear = [m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    others = sum(p.numel() for p in model.parameters()) - sum(linear)
    split = sum(linear) // 2 + 2 * others
    scales = sum(n // 64 + 4 * -(-n // 64 // 256) if double else 4 * n // 64 for n in linear)

    def parameters(kind, processes):
        plan = plan_memory(config, Method(0.25), Engine(kind, processes), model_config=LLAMA)
        return plan.parts["parameters"], plan.loading

    whole, none = parameters("ddp", 2)
    adapters = whole - split - scales
    assert none == 0 and 0 < adapters < 0.4 * split
    for kind in ("zero3", "fsdp2"):
        (two, loading), (eight, _) = (parameters(kind, n) for n in (2, 8))
        assert loading == whole
        assert two - eight == pytest.approx((split + adapters) * 3 / 8, rel=0.02)
        assert scales + split / 8 < eight


def test_plan_agrees_with_a_real_step_on_4_bit_weights(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32).save_pretrained(tmp_path)
    config = run_config(*LORA, "model.quantization=nf4", f"model.name_or_path={tmp_path}")
    method = Method(0.2)
    planned = plan_memory(config, method, CPU)
    measured = measured_peak(config, method, LLAMA, load_model(config.model))
    assert planned.peak == pytest.approx(measured, rel=0.1)


def full_plan(kind: str, processes: int = 4, **options):
    config = run_config("model.dtype=bfloat16", "training.gradient_accumulation_steps=2")
    return plan_memory(config, Method(0.25), Engine(kind, processes, **options), model_config=LLAMA).parts


def test_engines_keep_what_they_shard():
    """Against arithmetic: N weights in 2 bytes, P processes; Adam has two moments, DeepSpeed a float32 master copy."""
    weights = AutoModelForCausalLM.from_config(LLAMA).num_parameters()
    bucket = 2 * 2 * LLAMA.hidden_size**2
    single, ddp = full_plan("single", 1), full_plan("ddp")
    assert single["parameters"] == pytest.approx(2 * weights, rel=0.01)
    assert single["gradients"] == ddp["gradients"] / 2 == 2 * weights
    assert single["optimizer"] == ddp["optimizer"] == pytest.approx(4 * weights, rel=0.01)
    zero1, zero2, zero3 = (full_plan(f"zero{stage}") for stage in (1, 2, 3))
    for plan in (zero1, zero2, zero3):
        assert plan["optimizer"] == pytest.approx(12 * weights / 4, rel=0.01)
    assert zero1["parameters"] == zero2["parameters"] == single["parameters"]
    assert zero1["gradients"] == 2 * weights + bucket
    assert zero2["gradients"] == zero3["gradients"] == pytest.approx(2 * weights / 4 + bucket, rel=0.01)
    fsdp2 = full_plan("fsdp2")
    assert fsdp2["optimizer"] == pytest.approx(4 * weights / 4, rel=0.01)
    for plan in (zero3, fsdp2):
        assert 2 * weights / 4 < plan["parameters"] < single["parameters"] * 1.25


def test_offloaded_states_are_not_on_the_device():
    offloaded = full_plan("zero3", offload_optimizer=True, offload_parameters=True)
    assert offloaded["optimizer"] == 0
    assert offloaded["parameters"] < full_plan("zero3")["parameters"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("single", Engine()),
        ("ddp", Engine("ddp", 8)),
        ("ddp_cpu", Engine("ddp", 2, on_cpu=True)),
        ("zero1", Engine("zero1", 8, reduce_bucket=500_000_000)),
        ("zero2", Engine("zero2", 8)),
        ("zero3", Engine("zero3", 8)),
        ("zero3_offload", Engine("zero3", 8, offload_optimizer=True, offload_parameters=True)),
        ("fsdp2", Engine("fsdp2", 8)),
        ("sp2", Engine("ddp", 8, sp_size=2)),
        ("sp_zero3", Engine("zero3", 8, sp_size=8)),
    ],
)
def test_engines_of_the_shipped_accelerate_configs(name, expected):
    assert read_engine(name) == expected
    if expected.processes > 1:
        assert read_engine(name, num_processes=16).processes == 16


@pytest.mark.parametrize(
    "text, message",
    [
        ("distributed_type: XLA", "XLA cannot be planned"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "fsdp_version 2"),
        ("parallelism_config: {parallelism_config_tp_size: 2}", "tensor and context parallelism"),
        ("parallelism_config: {parallelism_config_sp_size: 2}", "does not divide the 1 process"),
        ("distributed_type: FSDP\nparallelism_config: {parallelism_config_sp_size: 2}", "together with FSDP"),
    ],
)
def test_other_layouts_are_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_engine(path)


def test_ranks_that_share_texts_need_less_and_compute_their_part():
    config = run_config(*LORA)
    # Ranks that share a text train on all tokens as on a share of 1.
    alone = plan_memory(config, Method(1.0), Engine("zero3", 4), model_config=LLAMA)
    shared = plan_memory(config, Method(), Engine("zero3", 4, sp_size=4), model_config=LLAMA)
    assert shared.peak - shared.states < 0.35 * (alone.peak - alone.states)
    assert shared.work.flops == pytest.approx(alone.work.flops / 4, rel=0.02)
    assert not torch.distributed.is_initialized()
    with pytest.raises(UserError, match="3 sequence-parallel ranks cannot share 4 query heads"):
        plan_memory(config, Method(0.1), Engine("ddp", 3, sp_size=3), model_config=LLAMA)


@pytest.mark.parametrize("model,gib", [("llama-3.1-70b", 44.7), ("llama-3.1-8b", 7.5)])
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_large_models_in_4_bits_fit_two_small_gpus(engine, model, gib):
    """Steps on selected tokens, and what is held before them; ordinary training of 8B under FSDP2 does not."""
    config = load_config("llama-3.1-70b-qlora", [f"model.name_or_path={find_shape(model).name}"])
    plans = [
        plan_memory(config, method, Engine(engine, 2), tokens=2048)
        for method in (Method(0.1, recompute=True), Method(recompute=True))
    ]
    ours, ordinary = (max(plan.peak, plan.loading) / 2**30 for plan in plans)
    assert ours < gib and (ordinary < gib) == ((engine, model) != ("fsdp2", "llama-3.1-8b"))


@pytest.mark.parametrize("engine", [Engine(), CPU], ids=["cuda", "cpu"])
def test_keys_and_values_are_told_from_activations(engine):
    """Of all tokens, in the layer that has a gradient below it. On a GPU those of few rows are side by side in one."""
    plan = plan_memory(run_config(*LORA), Method(0.25), engine, model_config=LLAMA)
    (parts,) = [stretch.parts for stretch in plan.stretches if stretch.name == "head"]
    of_the_second = 2 * SIZES["tokens"] * LLAMA.num_key_value_heads * (128 // LLAMA.num_attention_heads) * 4
    assert parts["keys_values"] == pytest.approx(of_the_second, rel=0.1)


def test_exact_layers_add_what_they_store():
    """A layer's activations of all tokens, in place of those of a fifth of them."""
    online = benchmarks.plan.ONLINE
    plans = [
        plan_memory(run_config(*online, f"selection.exact_layers={n}"), Method(0.2), CPU, model_config=LLAMA)
        for n in (0, 1, "auto")
    ]
    assert plans[1].parts["activations"] > plans[0].parts["activations"]
    assert plans[2].parts == plans[1].parts


def test_what_cannot_be_planned_is_refused(tmp_path):
    with pytest.raises(UserError, match="ZeRO-3 splits parameters.*int8"):
        plan_memory(run_config(*LORA, "model.quantization=int8"), engine=Engine("zero3", 2), model_config=LLAMA)
    with pytest.raises(UserError, match="no config that Transformers can read"):
        plan_memory(run_config(f"model.name_or_path={tmp_path}"))
    with pytest.raises(UserError, match="gpt-oss.*attn_implementation=sdpa.*--set model.attn_implementation=eager"):
        plan_memory(run_config("model.name_or_path=openai/gpt-oss-20b"))


def test_largest_ratio_is_the_largest_that_fits():
    config = run_config(*LORA)
    fits, does_not = (plan_memory(config, Method(ratio), CPU, model_config=LLAMA).peak for ratio in (0.37, 0.38))
    choice = largest_ratio(config, fits, CPU, model_config=LLAMA)
    assert choice.plan.peak == fits < does_not
    assert choice.ratio == 0.37


def test_where_nothing_fits_other_knobs_are_told():
    batch = "training.per_device_train_batch_size=2"
    config = run_config(batch)
    budget = plan_memory(run_config(*LORA, batch), Method(0.01), CPU, model_config=LLAMA).peak
    choice = largest_ratio(config, budget, CPU, model_config=LLAMA)
    assert choice.ratio is None
    lora = next(knob for knob in choice.knobs if knob.how.startswith("--set peft.method=lora"))
    assert lora.fits and lora.plan.peak == budget
    peaks = [knob.plan.peak for knob in choice.knobs]
    assert peaks == sorted(peaks) and peaks[-1] < choice.plan.peak


def test_the_command(tmp_path, capsys):
    LLAMA.save_pretrained(tmp_path)
    settings = {"model.name_or_path": tmp_path, "data.max_length": 64, "output_dir": tmp_path / "run"}
    command = ["plan", "--preset", "llama-3.2-1b-loha", *(f"--set={key}={value}" for key, value in settings.items())]
    outputs = [
        "--json",
        str(tmp_path / "p.json"),
        "--plot",
        str(tmp_path / "p.png"),
        "--html",
        str(tmp_path / "p.html"),
    ]
    assert main([*command, "--ratios", "0.2", "--accelerate-config", "zero2", *outputs]) == 0
    assert (tmp_path / "p.png").stat().st_size > 10_000
    page = (tmp_path / "p.html").read_text()
    assert "default-src" in page and "TokenSeek r = 0.2" in page
    plans = json.loads((tmp_path / "p.json").read_text())
    assert [plan["method"]["ratio"] for plan in plans] == [None] * 4 + [0.2] * 5
    assert set(plans[0]["parts"]) == set(CATEGORIES)
    told = capsys.readouterr().out
    assert "zero2, 8 processes; 1 x 64 tokens; loha r = 8, weights in bfloat16, computed in bf16\n" in told
    assert "saves nothing" not in told
    assert main([*command, "--ratios", "0.2", "--gpu", "H100", "--json", str(tmp_path / "p.json")]) == 0
    plans = json.loads((tmp_path / "p.json").read_text())
    assert plans[0]["work"]["seconds"] > plans[4]["work"]["seconds"] > 0 and plans[4]["work"]["sent"] == 0
    (told, work) = capsys.readouterr().out, plans[4]["work"]
    assert "H100, estimate" in told
    assert re.search(rf"{work['launches']:,} +{7.5e-6 * work['launches']:.4f}", told)
    assert main([*command, "--ratios", "0.2", "--gpu", "H100", "--launch-us", "20"]) == 0
    assert re.search(rf"{work['launches']:,} +{2e-5 * work['launches']:.4f}", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main([*command, "--launch-us", "-1"])
    assert "'-1' is no number of microseconds" in capsys.readouterr().err
    assert main([*command, "--gpu", "H10"]) == 2
    assert "did you mean H100?" in capsys.readouterr().err
    assert main([*command, "--ratios", "0.2", "--budget", "1GiB"]) == 0
    printed = capsys.readouterr().out
    assert "r = 1 is the largest share that fits" in printed
    assert "fits, fastest on A100-40 first" in printed
    assert "--set selection.ratio=0.2 --set training.per_device_train_batch_size=8" in printed
    assert main([*command, "--budget", "1MiB"]) == 1
    assert "nothing fits" in capsys.readouterr().out
    assert main([*command, "--budget", "8 elephants"]) == 2
    assert main([*command, "--set", "selection.rule=all", "--budget", "1GiB"]) == 2
    assert "--budget fits the share r of the tokens, and selection.rule: all takes none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_peak_of_the_optimizer_is_told_with_what_makes_it_smaller(tmp_path, capsys):
    LLAMA.save_pretrained(tmp_path)
    command = ["plan", f"--model={tmp_path}", "--tokens=16", "--ratios=0.2"]
    # Casts of all weights, logits of online scoring and a second embedding's gradient would outweigh so small a step.
    small = ["--preset=gsm8k", "--set=model.dtype=float32", "--set=training.mixed_precision=no"]
    small += ["--set=training.gradient_accumulation_steps=1"]
    assert main([*command, "--method", "full", *small]) == 0
    told = capsys.readouterr().out
    assert "2 x 16 tokens; full fine-tuning, weights in float32\n" in told
    (line,) = [line for line in told.splitlines() if "selection saves nothing at this peak" in line]
    assert line.startswith("TokenSeek r = 0.2") and "--method lora" in line and "--method qlora" in line
    assert main([*command, "--tokens=512"]) == 0  # activations of an adapter's step are far more
    told = capsys.readouterr().out
    assert "; LoRA, weights in bfloat16, computed in bf16\n" in told and "saves nothing" not in told
