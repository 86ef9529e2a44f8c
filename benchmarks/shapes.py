"""Model shapes with random weights; nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def _shape(model_type, layers, hidden, heads, key_value_heads, mlp, vocab, head_dim=None, tied=True) -> dict:
    return dict(
        model_type=model_type,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=mlp,
        vocab_size=vocab,
        head_dim=head_dim or hidden // heads,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "tiny": _shape("llama", 2, 64, 4, 2, 128, 256),
    "110m": _shape("llama", 12, 768, 12, 4, 2048, 32000),
    "smollm2-135m": _shape("llama", 30, 576, 9, 3, 1536, 49152),
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 14, 2, 4864, 151936),
    "llama-3.2-1b": _shape("llama", 16, 2048, 32, 8, 8192, 128256),
    "llama-3.2-3b": _shape("llama", 28, 3072, 24, 8, 8192, 128256, head_dim=128),
    "llama-3.1-8b": _shape("llama", 32, 4096, 32, 8, 14336, 128256, tied=False),
    "llama-2-7b": _shape("llama", 32, 4096, 32, 32, 11008, 32000, tied=False),
}


def model_config(shape: str) -> PreTrainedConfig:
    """
    Args:
        shape: a name of `SHAPES`, with changes after a colon: ``"110m:num_hidden_layers=4,hidden_size=512"``.
    """
    name, _, changes = shape.partition(":")
    if name not in SHAPES:
        raise SystemExit(f"--shape {shape}: no shape named {name!r}; there are {', '.join(SHAPES)}.")
    values = dict(SHAPES[name])
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key not in values or not value.isdigit():
            raise SystemExit(f"--shape {shape}: {change!r} is not KEY=NUMBER with a key among {', '.join(values)}.")
        values[key] = int(value)
    special = dict(max_position_embeddings=131072, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return AutoConfig.for_model(**values, **special)


def make_model(
    shape: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """A causal LM of :func:`model_config`, with seeded random weights, in training mode."""
    config = model_config(shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).train()
