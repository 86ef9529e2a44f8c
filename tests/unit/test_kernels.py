"""Compiled regions and Liger's kernels, as far as they show without a GPU."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from tiny_models import tiny_model
from tiny_preset import tiny_preset
from torch._dynamo.testing import CompileCounter

import tokenseek
from tokenseek.errors import UserError
from tokenseek.launching import processes
from tokenseek.launching.environment import let_memory_segments_grow
from tokenseek.models import loading
from tokenseek.models.kernels import apply_liger, compile_regions, require_kernels
from tokenseek.runs import train
from tokenseek.training.arguments import training_arguments


def config(*settings):
    return tokenseek.load_config("gsm8k", ["model.name_or_path=m", "data.sources.0.path=d.jsonl", *settings])


def step(model, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (1, tokens), generator=generator)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, selected_positions=torch.arange(1, tokens, 3)[None]).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind,regions", [("llama", 3), ("qwen3", 3), ("gemma3", 5), ("gpt2", 1), ("gpt_neox", 1)])
def test_regions_have_no_break_and_are_not_compiled_anew(kind, regions):
    """`fullgraph` raises at a break. Lengths vary in every step, of both passes."""
    torch._dynamo.reset()
    plain = tokenseek.enable_token_ditching(tiny_model(kind))
    model, counter = tiny_model(kind), CompileCounter()
    assert compile_regions(model, backend=counter) == 4 * regions
    tokenseek.enable_token_ditching(model)
    graphs = []
    for number, tokens in enumerate((40, 57, 31, 80)):
        for made, expected in zip(step(model, tokens, number), step(plain, tokens, number), strict=True):
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs[1] == graphs[-1], graphs  # nothing beyond the second length


def test_regions_with_adapters():
    torch._dynamo.reset()
    lora = peft.LoraConfig(target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    model, counter = peft.get_peft_model(tiny_model("llama"), lora), CompileCounter()
    compile_regions(model, backend=counter)
    tokenseek.enable_token_ditching(model)
    assert all(x.isfinite().all() for tokens in (40, 57) for x in step(model, tokens))
    assert counter.frame_count


def test_what_cannot_be_had_is_refused(monkeypatch):
    require_kernels(config())
    require_kernels(config("training.compile=true"))
    monkeypatch.setattr("tokenseek.models.kernels.find_spec", lambda name: None)
    with pytest.raises(UserError, match="liger-kernel is not installed"):
        require_kernels(config("training.liger=true"))
    monkeypatch.setattr("tokenseek.models.kernels.find_spec", lambda name: object())
    with pytest.raises(UserError, match="run on GPUs, and none is here"):
        require_kernels(config("training.liger=true"))
    with pytest.raises(UserError, match="training.compile is not supported with model.quantization: nf4"):
        require_kernels(config("training.compile=true", "model.quantization=nf4", "peft.method=lora"))
    monkeypatch.setattr("tokenseek.launching.environment.zero_stage", lambda: 3)
    with pytest.raises(UserError, match="training.compile is not supported with ZeRO-3"):
        require_kernels(config("training.compile=true"))


def test_ligers_losses_are_left_out(monkeypatch):
    """The package is a stand-in: what it is asked for."""
    asked = []

    def of_llama(rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy, model=None):
        pass

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": of_llama}
    patch._apply_liger_kernel_to_instance = lambda model, **options: asked.append(options)
    for module in (package, transformers, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    apply_liger(tiny_model("llama"))
    assert asked == [dict(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)]
    with pytest.raises(UserError, match="nothing for model type 'gpt2'"):
        apply_liger(tiny_model("gpt2"))


@pytest.mark.parametrize("on_gpu,optim", [(True, "adamw_torch_fused"), (False, "adamw_torch")])
def test_adamw_is_fused_on_a_gpu(monkeypatch, tmp_path, on_gpu, optim):
    made = []
    monkeypatch.setattr("tokenseek.training.arguments.TrainingArguments", lambda **values: made.append(values))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    training_arguments(config().training, tmp_path, 0)
    training_arguments(config("training.optim=adafactor").training, tmp_path, 0)
    assert [values["optim"] for values in made] == [optim, "adafactor"]


@pytest.mark.parametrize(
    "on_gpu,zero3,fsdp,placed", [(1, 0, 0, True), (1, 1, 0, False), (1, 0, 1, False), (0, 0, 0, False)]
)
def test_models_are_loaded_on_their_device(monkeypatch, on_gpu, zero3, fsdp, placed):
    asked = []
    monkeypatch.setattr(loading, "model_folder", lambda model: model.name_or_path)
    for name in ("keep_4bit_differentiable", "keep_text_alone"):
        monkeypatch.setattr(loading, name, lambda model: None)

    def from_pretrained(folder, **options):
        asked.append(options)
        return SimpleNamespace(), {"missing_keys": []}

    load = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setattr(loading, "AutoConfig", SimpleNamespace(from_pretrained=lambda folder, **options: None))
    monkeypatch.setattr(loading, "auto_class", lambda config: load)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(on_gpu))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: bool(zero3))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(bool(fsdp)).lower())
    loading.load_model(config().model)
    assert asked[0].get("device_map") == ({"": 3} if placed else None)


def test_segments_grow_unless_said_otherwise(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
        let_memory_segments_grow()
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    let_memory_segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_a_launch_lets_them_grow_before_it_touches_a_gpu(monkeypatch):
    done = []
    monkeypatch.setattr(processes.environment, "let_memory_segments_grow", lambda: done.append("grow"))
    monkeypatch.setattr(
        processes, "PartialState", lambda **options: done.append("join") or SimpleNamespace(num_processes=1)
    )
    processes.join_processes()
    assert done == ["grow", "join"]


@pytest.mark.parametrize("setting", ["compile", "liger"])
def test_a_run_has_the_kernels_that_it_asks_for(monkeypatch, tmp_path, setting):
    asked = []
    monkeypatch.setattr("tokenseek.runs.preparation.require_kernels", lambda config: None)
    for name in ("compile_regions", "apply_liger"):
        monkeypatch.setattr(train, name, lambda model, name=name: asked.append(name))
    train.train(tiny_preset(tmp_path, f"training.{setting}=true", "selection.rule=random", "training.max_steps=1"))
    assert asked == [{"compile": "compile_regions", "liger": "apply_liger"}[setting]]
