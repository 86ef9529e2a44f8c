"""What a launch's engine is refused for, and models that are whole whatever it is."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from tokenseek.config.resources import find_resource
from tokenseek.errors import UserError
from tokenseek.launching.environment import zero_stage
from tokenseek.launching.processes import require_engine, whole_models

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
    with pytest.raises(UserError, match="FSDP splits parameters.*nf4.*zero2.yaml"):
        require_engine(GPU, "nf4")


def test_quantised_weights_are_refused_where_parameters_are_split(deepspeed):
    deepspeed("zero2")
    require_engine(CPU, "nf4")
    deepspeed("zero3")
    require_engine(CPU, None)
    with pytest.raises(UserError, match="ZeRO-3 splits parameters.*int8.*scales"):
        require_engine(CPU, "int8")


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
