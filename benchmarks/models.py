"""Which architectures are served, tried on a tiny random model of each; the table of docs/models.md.

    python -m benchmarks.models                   # print the table
    python -m benchmarks.models --write           # and write it into docs/models.md
    python -m benchmarks.models --only qwen3_5,lfm2

Every cell is a run: the losses of a packed row and of ranks that share a text have to be those of one process.

Shapes: B batch, T tokens, S selected.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import AutoConfig

import tokenseek
from benchmarks.sequence_parallel import in_processes
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import Seeking
from tokenseek.ditching.packing import require_packable
from tokenseek.errors import UserError
from tokenseek.models.loading import auto_class
from tokenseek.parallel import enable_sequence_parallelism
from tokenseek.seeking import TokenScorer
from tokenseek.selection import SelectionRule

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- written by python -m benchmarks.models --write -->", "<!-- until here -->"
VOCAB, TOKENS = 97, 12
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "mamba_expand": 2, "mamba_d_ssm": 64,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 24, "num_key_value_heads": 4,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def _in_wrapper(vision: dict, **text) -> dict:
    return {"text_config": {**BASE, **text}, "vision_config": vision}


# model_type -> (models that people know, config values on top of the base; a wrapper brings its own)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama 2 and 3, SmolLM 2, Yi", {}),
    "mistral": ("Mistral 7B", {"sliding_window": 5}),
    "mixtral": ("Mixtral", MOE),
    "qwen2": ("Qwen 2 and 2.5, DeepSeek-R1 distilled", {}),
    "qwen3": ("Qwen 3", {}),
    "qwen3_moe": ("Qwen 3 MoE", MOE),
    "gemma2": ("Gemma 2", {**SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma 3 1B", {**SLIDING, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi-3, Phi-4", {}),
    "gpt_oss": ("gpt-oss", {**MOE, **SLIDING}),
    "smollm3": ("SmolLM 3", {}),
    "olmo2": ("OLMo 2", {}),
    "granite": ("Granite 3", {}),
    "deepseek_v3": ("DeepSeek-V3, R1", MLA),
    "glm4": ("GLM-4", {}),
    "cohere2": ("Command R7B", SLIDING),
    "starcoder2": ("StarCoder 2", {}),
    "stablelm": ("StableLM", {}),
    "falcon": (
        "Falcon",
        {"head_dim": None, "ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "gpt2": ("GPT-2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("Pythia", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BLOOM", {"n_head": 4, "n_layer": 4}),
    "gemma4_text": (
        "Gemma 4, text",
        {**SLIDING, "global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": VOCAB},
    ),
    "gemma3n_text": (
        "Gemma 3n",
        {**SLIDING, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
         "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "qwen3_next": ("Qwen3-Next", {**LINEAR, **MOE, "shared_expert_intermediate_size": 24}),
    "qwen3_5_text": ("Qwen 3.5", LINEAR),
    "lfm2": ("LFM2", {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48}),
    "granitemoehybrid": (
        "Granite 4 hybrid",
        {**MAMBA, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 48},
    ),
    "bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1, 3]}),
    "jamba": ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}),
    "falcon_h1": ("Falcon-H1", MAMBA),
    "mamba": ("Mamba", {"state_size": 4}),
    "mamba2": ("Mamba 2", {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8}),
    "gemma3": ("Gemma 3 4B to 27B", _in_wrapper(TOWER, sliding_window=5)),
    "mistral3": (
        "Mistral Small 3",
        _in_wrapper({**TOWER, "model_type": "pixtral", "head_dim": 8}, model_type="mistral"),
    ),
    "qwen2_5_vl": ("Qwen 2.5-VL", _in_wrapper(VISION, **MROPE)),
    "qwen3_vl": ("Qwen 3-VL", _in_wrapper(VISION, **MROPE)),
    "llava": ("LLaVA", _in_wrapper({**TOWER, "model_type": "clip_vision_model"}, model_type="llama")),
}  # fmt: skip

COLUMNS = ("all tokens", "scores", "selected", "in the step", "packed", "ranks share texts")
RANKS = 2
# Transformers makes these with eager attention only.
EAGER = ("gpt_oss", "gemma2", "bloom", "mamba", "mamba2")


def tiny(name: str) -> nn.Module:
    values = ARCHITECTURES[name][1]
    values = values if "text_config" in values else {**BASE, **values}
    config = AutoConfig.for_model(name, **{key: value for key, value in values.items() if value is not None})
    torch.manual_seed(0)
    backend = "eager" if name in EAGER else "sdpa"
    model = auto_class(config).from_config(config, attn_implementation=backend, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def batch_of(tokens: int = TOKENS, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def chosen(start: int = 0) -> torch.Tensor:
    return torch.tensor([[start + position for position in (1, 2, 5, 8, TOKENS - 1)]])


def all_tokens(model: nn.Module) -> None:
    model(**batch_of()).loss.backward()


def scores(model: nn.Module) -> None:
    batch = batch_of()
    TokenScorer(model).score(batch["input_ids"], torch.ones_like(batch["input_ids"]), batch["labels"])


def selected(model: nn.Module) -> None:
    tokenseek.enable_token_ditching(model)
    batch = batch_of()
    expected = model(**batch).loss
    loss = model(**batch, selected_positions=torch.arange(TOKENS)[None]).loss
    _require_same(loss, expected)
    model(**batch, selected_positions=chosen()).loss.backward()


def in_the_step(model: nn.Module) -> None:
    tokenseek.enable_token_ditching(model, seeking=Seeking("l2"))
    rule = SelectionRule("top", ratio=0.3, alpha=1.0, beta=1.0)
    output = model(**batch_of(), selection=rule, selection_keys=torch.tensor([3]))
    output.loss.backward()
    _require_same(output.loss_all, model(**batch_of()).loss)


def packed(model: nn.Module) -> None:
    require_packable(find_decoder(model))
    tokenseek.enable_token_ditching(model)
    batches = [batch_of(seed=seed) for seed in (0, 1)]
    apart = sum(model(**batch, selected_positions=chosen(), num_items_in_batch=1).loss for batch in batches)
    row = {name: torch.cat([batch[name] for batch in batches], dim=1) for name in batches[0]}
    row["labels"] = row["labels"].clone()
    row["labels"][0, TOKENS] = -100
    position_ids = torch.arange(TOKENS).repeat(2)[None]
    positions = torch.cat([chosen(), chosen(TOKENS)], dim=1)
    loss = model(**row, position_ids=position_ids, selected_positions=positions, num_items_in_batch=1).loss
    _require_same(loss, apart)
    loss.backward()


def shared(rank: int, ranks: int, names: tuple[str, ...]) -> dict[str, str]:
    """On each of the ranks that share the texts of every model."""
    return {name: outcome(name, _shared) for name in names}


def _shared(model: nn.Module) -> None:
    whole = tokenseek.enable_token_ditching(copy.deepcopy(model))
    enable_sequence_parallelism(model, dist.group.WORLD)
    expected = whole(**batch_of(), selected_positions=chosen()).loss
    loss = model(**batch_of(), selected_positions=chosen()).loss
    _require_same(loss, expected)
    loss.backward()


class Differs(Exception):
    """Two ways to the same loss gave two losses."""


def _require_same(loss: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.isclose(loss, expected, rtol=1e-4):
        raise Differs(f"the loss is {loss.item():.6f} and should be {expected.item():.6f}")


def outcome(name: str, run: Callable[[nn.Module], None]) -> str:
    """Empty if it runs, else the reason."""
    try:
        run(tiny(name))
    except UserError as error:
        return " ".join(str(error).split())
    except Exception as error:  # a table of what works says too what does not, and how
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def try_all(names: list[str]) -> dict[str, list[str]]:
    """Of each architecture the outcomes of the columns."""
    found = {}
    for name in names:
        found[name] = [outcome(name, run) for run in (all_tokens, scores, selected, in_the_step, packed)]
    by_rank = in_processes(RANKS, shared, tuple(names))
    for name in names:
        found[name].append(next((rank[name] for rank in by_rank if rank[name]), ""))
    return found


def table(found: dict[str, list[str]]) -> list[str]:
    """The lines of the table, and behind them the reasons that it numbers."""
    lines = [
        f"| architecture | models | {' | '.join(COLUMNS)} |",
        f"| --- | --- | {' | '.join(':-:' for _ in COLUMNS)} |",
    ]
    for name, outcomes in found.items():
        cells = [f"no: {reason_of(outcome)}" if outcome else "yes" for outcome in outcomes]
        lines.append(f"| `{name}` | {ARCHITECTURES[name][0]} | {' | '.join(cells)} |")
    return lines


# What a message says, in a word or two; the others are printed as they are.
REASONS = {
    "no layer with keys and values": "state alone",
    "is not either such a layer or attention": "state beside attention",
    "hidden states per token": "several hidden states",
    "carries a state from token to token": "state",
    "shares keys and values": "shared keys",
    "in another form": "latent keys",
    "in code of its own": "own attention",
    "makes its attention masks": "own masks",
    "position_ids": "no position_ids",
}


def reason_of(message: str) -> str:
    return next((reason for words, reason in REASONS.items() if words in message), message)


def page(text: str, found: dict[str, list[str]]) -> str:
    """The page `text` with a new table, and the version of Transformers that it was made with."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [BEGIN, f"Transformers {transformers.__version__}.", "", *table(found), "", END]
    return before + "\n".join(lines) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ARCHITECTURES)
    if args.write and args.only:
        parser.error("--write is for all architectures")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = try_all(names)
    print("\n".join(table(found)))
    if args.write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
