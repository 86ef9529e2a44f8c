"""Adapters by configuration: every method on every layout of layers, where it was asked for and nowhere else."""

import peft
import pytest
import torch
from tiny_models import VOCAB, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from tokenseek import UserError, enable_token_ditching
from tokenseek.config import PeftSettings
from tokenseek.models.adapters import add_adapter

METHODS = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.05},
    "loha": {"r": 4, "alpha": 8, "dropout": 0.05},
    "lokr": {"r": 4, "alpha": 8},
    "ia3": {},
    "dora": {"r": 4, "alpha": 8, "extra": {"use_dora": True}},
}
# Names within a layer: (feed-forward, attention).
LAYERS = {
    "llama": (
        {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
    ),
    "gpt2": ({"mlp.c_fc", "mlp.c_proj"}, {"attn.c_attn", "attn.c_proj"}),
    "opt": (
        {"fc1", "fc2"},
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
    ),
    "phi3": ({"mlp.gate_up_proj", "mlp.down_proj"}, {"self_attn.qkv_proj", "self_attn.o_proj"}),
}
GROUPS = {
    "feed_forward": lambda feed_forward, attention: feed_forward,
    "attention": lambda feed_forward, attention: attention,
    "all-linear": lambda feed_forward, attention: feed_forward | attention,
}


def settings(method, **options):
    name = "lora" if method == "dora" else method
    return PeftSettings(method=name, **METHODS[method] | options)


def adapted_modules(model):
    """Names within their layer of the modules that carry an adapter, and how many layers have each."""
    tuned = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    counts = {}
    for name in tuned:
        inside = name.split("layers.")[-1].split(".h.")[-1].split(".", 1)[1]
        counts[inside] = counts.get(inside, 0) + 1
    return counts


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "method,kind",
    [(m, k) for m in METHODS for k in LAYERS if (m, k) not in [("loha", "gpt2"), ("lokr", "gpt2")]],
)
def test_every_method_on_every_group_of_modules(method, kind, group):
    model = add_adapter(tiny_model(kind), settings(method, target_modules=group))
    assert adapted_modules(model) == dict.fromkeys(GROUPS[group](*LAYERS[kind]), 4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    marks = ("lora_", "hada_", "lokr_", "ia3_")
    assert trainable and all(any(mark in name for mark in marks) for name in trainable)

    ids = torch.randint(3, VOCAB, (1, 9))
    enable_token_ditching(model).train()
    model(input_ids=ids, labels=ids, selected_positions=torch.tensor([[1, 4, 7]])).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name in trainable}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert any(g.any() for g in gradients.values())


def test_settings_reach_the_config_under_the_methods_own_names():
    configs = {method: add_adapter(tiny_model("llama"), settings(method)).peft_config["default"] for method in METHODS}
    lora, loha, dora = configs["lora"], configs["loha"], configs["dora"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_dora) == (4, 8, 0.05, False)
    assert (loha.r, loha.alpha, loha.rank_dropout) == (4, 8, 0.05)
    assert dora.use_dora
    assert all(config.task_type == "CAUSAL_LM" for config in configs.values())


def test_modules_in_a_list():
    model = add_adapter(tiny_model("llama"), settings("lora", target_modules=["q_proj", "up_proj"]))
    assert adapted_modules(model) == {"self_attn.q_proj": 4, "mlp.up_proj": 4}


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_a_method_that_peft_does_not_have_for_the_layers_of_a_model(method):
    with pytest.raises(UserError, match=f"peft: {method} does not fit GPT2LMHeadModel: .*Conv1D"):
        add_adapter(tiny_model("gpt2"), settings(method))


def test_modules_that_the_model_does_not_have():
    with pytest.raises(UserError, match="peft: lora does not fit LlamaForCausalLM: .*up_porj"):
        add_adapter(tiny_model("llama"), settings("lora", target_modules=["up_porj"]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("by_name", [False, True])
def test_ia3_scales_what_enters_the_feed_forward_layers_and_what_leaves_attention(kind, by_name):
    feed_forward, attention = LAYERS[kind]
    targets = [sorted(feed_forward)[0].split(".")[-1], sorted(attention)[0]] if by_name else "all-linear"
    model = add_adapter(tiny_model(kind), settings("ia3", target_modules=targets))
    scaled = {n: m.is_feedforward for n, m in model.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)}
    assert scaled == {name: "attn" not in name for name in scaled} and set(scaled.values()) == {False, True}


def test_the_group_of_a_mixture_of_experts_that_has_no_linear_layer_is_refused():
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="feed_forward finds no linear layer.*name the modules in a list"):
        add_adapter(model, settings("lora"))
    assert adapted_modules(add_adapter(model, settings("lora", target_modules="attention")))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"method": "lora", "extra": {"use_dorra": True}}, r"peft.extra: lora takes no .*use_dorra.*use_dora"),
        ({"method": "loha", "extra": {"lora_alpha": 3}}, r"peft.extra: loha takes no \['lora_alpha'\]"),
        ({"method": "ia3", "r": 4}, "peft.r: ia3 has no such setting; leave it out"),
        ({"method": "ia3", "dropout": 0.1}, "peft.dropout: ia3 has no such setting"),
        ({"method": "lora", "extra": {"bias": "everything"}}, "peft: lora does not fit LlamaForCausalLM"),
        ({"method": "p_tuning", "r": 4}, "peft.method: p_tuning is not an adapter"),
        ({"method": "prompt_tuning"}, "peft.method: prompt_tuning is not an adapter"),
    ],
)
def test_settings_that_a_method_does_not_have(options, message):
    with pytest.raises(UserError, match=message):
        add_adapter(tiny_model("llama"), PeftSettings(**options))
