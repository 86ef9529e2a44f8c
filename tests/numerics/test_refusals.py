"""Models and settings that token ditching cannot serve are refused when it is switched on, with the reason."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import tokenseek
from tokenseek import SelectionRule
from tokenseek.decoder.names import CACHE_ARGUMENTS
from tokenseek.ditching import Seeking
from tokenseek.errors import UserError

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=50)


def config(model_type, **values):
    return AutoConfig.for_model(model_type, **{**SMALL, **values})


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: AutoModel.from_config(config("llama", num_key_value_heads=2)), "no causal language-modelling head"),
        (lambda: AutoModelForMaskedLM.from_config(config("bert")), "no causal language-modelling head|looks ahead"),
        (lambda: AutoModelForCausalLM.from_config(config("bert")), "looks ahead|not a text-only"),
        (
            lambda: AutoModelForSeq2SeqLM.from_config(
                AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=50)
            ),
            "encoder-decoder",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(config("mamba", state_size=4)),
            "state-space|takes no key/value cache",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(
                config(
                    "falcon_h1",
                    num_key_value_heads=2,
                    mamba_n_heads=4,
                    mamba_d_head=8,
                    mamba_d_ssm=32,
                    mamba_d_state=4,
                    mamba_n_groups=1,
                )
            ),
            "(layer 0 of it is not either such a layer or attention but holds FalconH1Mixer and FalconH1Attention"
            "|carries a state).*training.ditching: false",  # earlier Transformers do not tell the kinds of layers
        ),
        (lambda: torch.nn.Linear(2, 2), "not a Transformers model"),
    ],
    ids=["no-head", "masked-lm", "bert", "seq2seq", "mamba", "falcon-h1", "not-transformers"],
)
def test_models_that_are_no_decoders(build, message):
    with pytest.raises(UserError, match=message):
        tokenseek.enable_token_ditching(build())


def test_attention_backends_without_masks():
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="attn_implementation='sdpa'"):
        tokenseek.enable_token_ditching(model)


def test_prompt_tuning():
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="virtual tokens"):
        tokenseek.enable_token_ditching(peft.get_peft_model(tiny_model("llama"), tuning))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_that_selected_rows_cannot_give(name):
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    with pytest.raises(UserError, match=name):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), selected_positions=torch.tensor([[1]]), **{name: True})


def test_layers_that_do_not_show_their_keys_and_values(monkeypatch):
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward
    monkeypatch.setattr(
        attention,
        "forward",
        lambda self, *args, **given: forward(
            self, *args, **{n: v for n, v in given.items() if n not in CACHE_ARGUMENTS}
        ),
    )
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    with pytest.raises(UserError, match="does not pass its keys and values"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), selected_positions=torch.tensor([[1]]))


def _attends_by_itself(self, hidden_states, position_embeddings=None, attention_mask=None, **given):
    """Llama's attention without the interface, which is in its module all the same."""
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    projections = self.q_proj, self.k_proj, self.v_proj
    query, key, value = (project(hidden_states).view(heads).transpose(1, 2) for project in projections)
    query, key = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    for cache in (given.get(name) for name in CACHE_ARGUMENTS):
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
    is_causal = attention_mask is None
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=is_causal, enable_gqa=True
    )
    return self.o_proj(output.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("prompt", [3, 12], ids=["most-supervised", "few-supervised"])
@pytest.mark.parametrize(
    "seeking", [None, Seeking("error"), Seeking("l2", exact_layers=1)], ids=["positions", "error", "exact"]
)
def test_layers_that_attend_by_themselves(seeking, prompt, monkeypatch):
    """Causality of some rows among all is not that of a square, and nothing else would show it."""
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", _attends_by_itself)
    model = tokenseek.enable_token_ditching(tiny_model("llama"), seeking=seeking)
    ids = torch.arange(3, 19)[None]
    labels = ids.clone()
    labels[:, :prompt] = -100
    if seeking is None:
        given = {"selected_positions": torch.tensor([[1, 7, 14]])}
    else:
        rule = SelectionRule("sampled", ratio=0.3, alpha=0, beta=1, explore=0.3, scope="supervised")
        given = {"selection": rule, "selection_keys": torch.tensor([1])}
    with pytest.raises(UserError, match="does not attend by Transformers' AttentionInterface.*attn_implementation"):
        model(input_ids=ids, labels=labels, **given)
