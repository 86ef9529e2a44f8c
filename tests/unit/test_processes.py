"""What a launch's engine is refused for, and models that are whole whatever it is."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from tokenseek.cli import main
from tokenseek.config import load_config
from tokenseek.config.resources import find_resource
from tokenseek.errors import UserError
from tokenseek.launching.environment import zero_stage
from tokenseek.launching.processes import require_engine, whole_models
from tokenseek.models.loading import packing_dtype

CPU, GPU = (SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))


@pytest.fixture
def deepspeed(monkeypatch):
    def configure(name):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(find_resource("DeepSpeed config", name)))

    return configure


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_zero_stage(deepspeed, name, stage):
    assert zero_stage() == 0
    deepspeed(name)
    assert zero_stage() == stage


def test_fsdp_without_gpus_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="silently run DDP.*ddp_cpu.yaml"):
        require_engine(CPU, None)
    require_engine(GPU, None)


def test_packed_weights_are_refused_where_an_engine_cannot_split_them(deepspeed, monkeypatch):
    deepspeed("zero2")
    require_engine(CPU, "int8")
    deepspeed("zero3")
    for quantization in (None, "nf4", "fp4"):
        require_engine(CPU, quantization)
    with pytest.raises(UserError, match="ZeRO-3 splits parameters.*int8.*scales.*quantization=nf4"):
        require_engine(CPU, "int8")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    require_engine(GPU, None)
    with pytest.raises(UserError, match="FSDP 1 joins.*nf4.*fsdp2.yaml"):
        require_engine(GPU, "nf4")
    monkeypatch.setenv("FSDP_VERSION", "2")
    require_engine(GPU, "nf4")
    with pytest.raises(UserError, match="FSDP splits parameters.*int8"):
        require_engine(GPU, "int8")


@pytest.mark.parametrize("name, refused", [("ddp", False), ("zero2", False), ("zero3", True), ("fsdp2", True)])
def test_a_command_refuses_before_any_process_starts(monkeypatch, capsys, name, refused):
    launched = []
    monkeypatch.setattr("tokenseek.cli.launch_script", lambda *words: launched.append(words) or 0)
    words = ["train", "--preset", "llama-3.2-1b-qlora", "--accelerate-config", name]
    int8 = ["--set", "model.quantization=int8", "--set", "model.double_quantization=false"]
    assert main([*words, *int8]) == (2 if refused else 0)
    assert ("int8 weights cannot be split" in capsys.readouterr().err) == refused == (not launched)
    assert main(words) == 0


@pytest.mark.parametrize(
    "precision, dtype, packed_in",
    [("bf16", "bfloat16", torch.bfloat16), ("bf16", "float32", torch.bfloat16), ("no", "float32", torch.float32)],
)
def test_weights_are_packed_in_what_the_engine_gathers(monkeypatch, deepspeed, precision, dtype, packed_in):
    settings = ["model.quantization=nf4", f"model.dtype={dtype}", f"training.mixed_precision={precision}"]
    config = load_config("llama-3.2-1b-qlora", settings)
    assert packing_dtype(config) == torch.uint8
    deepspeed("zero2")
    assert packing_dtype(config) == torch.uint8
    deepspeed("zero3")
    assert packing_dtype(config) == packed_in
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert packing_dtype(config) == packed_in


def test_models_are_whole_inside(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("transformers.distributed.fsdp._is_torch_distributed_initialized", lambda: True)
    config = type("Config", (), {"is_zero3": lambda self: True})()  # Transformers keeps a weak reference
    set_hf_deepspeed_config(config)
    try:
        with whole_models():
            assert not is_deepspeed_zero3_enabled() and not is_fsdp_enabled()
        assert is_deepspeed_zero3_enabled() and is_fsdp_enabled()
    finally:
        unset_hf_deepspeed_config()
