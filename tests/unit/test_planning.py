"""The planner against real training steps, whose storages another counter follows; engines, budgets, the command."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks.memory import LiveStorages, storage_bytes
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tokenseek.cli import main
from tokenseek.config import load_config
from tokenseek.ditching import enable_token_ditching
from tokenseek.errors import UserError
from tokenseek.planning import CATEGORIES, Engine, Method, largest_ratio, plan_memory, read_engine
from tokenseek.planning.ledger import Ledger
from tokenseek.planning.packed import _packed_bytes
from tokenseek.runs.models import add_adapter

TOKENS = 384
LLAMA = dict(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=TOKENS,
    tie_word_embeddings=True,
)
GPT2 = dict(vocab_size=1000, n_embd=128, n_layer=4, n_head=4, n_positions=TOKENS)
LORA = ["peft.method=lora", "peft.r=8"]
CPU = Engine(on_cpu=True)


def run_config(*overrides: str):
    base = ["model.name_or_path=none", "model.dtype=float32", "data.sources.0.path=none", "output_dir=none"]
    return load_config(None, [*base, f"data.max_length={TOKENS}", *overrides])


def measured_peak(config, method: Method, model_config) -> int:
    """Bytes of all storages alive at the peak of a real optimizer step, taken as Trainer takes it."""
    torch.manual_seed(0)
    settings = config.training
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, attn_implementation="sdpa")
    if config.peft:
        model = add_adapter(model, config.peft)
    model.train()
    if method.ratio is not None:
        enable_token_ditching(model, recompute=method.recompute)
    elif method.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    batch = settings.per_device_train_batch_size
    ids = torch.randint(0, 1000, (batch, config.data.max_length))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, num_items_in_batch=ids.numel())
    if method.ratio is not None:
        count = round(method.ratio * ids.shape[1])
        inputs["selected_positions"] = torch.randperm(ids.shape[1])[:count].sort().values.expand(batch, -1).contiguous()

    def step():
        for _ in range(settings.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
                loss = model(**inputs).loss
            loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    kept = [*model.parameters(), *model.buffers(), *states]
    with LiveStorages().ignore([*kept, *(x for x in inputs.values() if torch.is_tensor(x))]) as live:
        step()
    return storage_bytes(kept) + live.peak


CASES = {
    "all tokens": ("llama", LLAMA, Method(), []),
    "all tokens, recomputed": ("llama", LLAMA, Method(recompute=True), LORA),
    "all tokens, gpt2, accumulated": ("gpt2", GPT2, Method(), ["training.gradient_accumulation_steps=2"]),
    "all tokens, bf16": ("llama", LLAMA, Method(), ["training.mixed_precision=bf16"]),
    "r = 0.1, LoRA": ("llama", LLAMA, Method(0.1), LORA),
    "r = 0.5, LoRA, B = 2": ("qwen2", LLAMA, Method(0.5), [*LORA, "training.per_device_train_batch_size=2"]),
    "r = 0.3, recomputed": ("qwen3", LLAMA | {"head_dim": 32}, Method(0.3, recompute=True), LORA),
    "r = 0.2, all weights": ("llama", LLAMA, Method(0.2), ["training.gradient_accumulation_steps=2"]),
    "r = 0.2, gpt2": ("gpt2", GPT2, Method(0.2), []),
    "r = 0.2, bf16": ("llama", LLAMA, Method(0.2), [*LORA, "training.mixed_precision=bf16"]),
    "r = 1": ("llama", LLAMA, Method(1.0), LORA),
}


@pytest.mark.parametrize("case", CASES)
def test_plan_agrees_with_a_real_step(case):
    kind, shape, method, overrides = CASES[case]
    config, model_config = run_config(*overrides), AutoConfig.for_model(kind, **shape)
    planned = plan_memory(config, method, CPU, model_config=model_config)
    measured = measured_peak(config, method, model_config)
    assert planned.peak == pytest.approx(measured, rel=0.05)
    # Weights and their states, which are easily counted, must not hide an error in the rest.
    assert planned.peak - planned.states == pytest.approx(measured - planned.states, rel=0.1)
    assert sum(planned.parts.values()) == planned.peak
    print(case, planned.peak / measured, (planned.peak - planned.states) / (measured - planned.states))
