"""Tiny random causal language models of every family that the numerics run on.

They are small enough for float64 on a CPU, and odd enough to catch shape mistakes: grouped-query heads, windows shorter
than the sequence, soft-caps low enough to bite.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
# The last layer is the one that seeking reads.
_LAST_SLIDES = ["full_attention", "sliding_attention"] * 2

# kind -> (model_type, config values on top of the base)
_KINDS = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "gemma2": (
        "gemma2",
        {
            **_GEMMA,
            "sliding_window": 5,
            "layer_types": _LAST_SLIDES,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, "sliding_window": 5, "layer_types": _LAST_SLIDES}),
    "phi3": ("phi3", {}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 128,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
            "dropout": 0.1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "head_dim": 8}),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": _LAST_SLIDES,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "hidden_act": "gelu"}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "smollm3": ("smollm3", {}),
}
# Kinds whose layers differ: with a state and with attention, or with keys and values of layers below.
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_HYBRID_KINDS = {
    "qwen3_5": ("qwen3_5_text", {**_LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "qwen3_next": ("qwen3_next", {**_LINEAR, **_MOE, "layer_types": ["linear_attention", "full_attention"] * 2,
                                  "shared_expert_intermediate_size": 24}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "full_attention", "conv"], "block_ff_dim": 48,
                      "block_auto_adjust_ff_dim": False}),
    "granite_hybrid": ("granitemoehybrid", {**_MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"],
                                            "num_local_experts": 0, "shared_intermediate_size": 48, "mamba_expand": 2}),
    "gemma4": ("gemma4_text", {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 2, "sliding_window": 5,
                               "layer_types": ["sliding_attention", "full_attention"] * 2,
                               "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}),
}  # fmt: skip
_OWN_BASE = ("gpt2", "opt")  # whose configs name everything differently

KINDS = tuple(_KINDS)
HYBRIDS = tuple(_HYBRID_KINDS)
EAGER_ONLY = ("gemma2", "gpt_oss")  # soft-cap and attention sinks, which sdpa does not serve
# These compute norms, rotary embeddings, routing or softmax in float32 inside, whatever the model's dtype.
FLOAT32_INSIDE = ("gemma2", "gemma3", "qwen3_moe", "gpt_oss", "qwen3_5", "qwen3_next", "granite_hybrid", "gemma4")


def computed_in(kind: str, attn: str = "sdpa") -> torch.dtype:
    """The lowest precision that a tiny model of float64 computes in, where its rows are not the same on both sides."""
    return torch.float32 if kind in FLOAT32_INSIDE or attn == "eager" else torch.float64


def tiny_model(
    kind: str, *, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A seeded tiny model in evaluation mode; `overrides` are values of its config.

    Weights are larger than a fresh initialisation's, so that attention is far from uniform. Experts run eagerly, since
    grouped GEMMs have no float64.
    """
    model_type, values = (_KINDS | _HYBRID_KINDS)[kind]
    base = {} if kind in _OWN_BASE else _BASE
    config = AutoConfig.for_model(model_type, **{**base, **values, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.dim() > 1 else 0.05))
    return model.to(dtype).eval()
