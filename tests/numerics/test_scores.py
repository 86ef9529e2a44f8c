"""Context and gradient scores, against whole attention maps and a plain autograd pass through the untouched model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from closeness import assert_close, errors
from tiny_models import EAGER_ONLY, KINDS, VOCAB, computed_in, tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from benchmarks.memory import LiveStorages
from tokenseek.decoder.find import find_decoder
from tokenseek.decoder.head import next_token_labels
from tokenseek.errors import UserError
from tokenseek.seeking import TokenScorer
from tokenseek.seeking.context import attention_received
from tokenseek.seeking.gradient import gradient_from, head_scores, loss_gradient

SERVED = [
    (kind, attn)
    for kind in KINDS
    for attn in ("sdpa", "eager")
    if (kind, attn) not in {(k, "sdpa") for k in EAGER_ONLY}
]


def make_batch(lengths=(19, 7, 13), prompt=4, seed=0):
    """input_ids, attention_mask and labels [B, T], padded on the right; longer than the tiny models' windows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return ids, mask, labels


def context_reference(kind, ids, mask, dtype):
    """Column sums of the last layer's attention map, averaged over heads, of one example at a time without padding."""
    model = tiny_model(kind, attn="eager", dtype=dtype)
    reference = torch.zeros(ids.shape, dtype=dtype)
    for i, length in enumerate(mask.sum(1).tolist()):
        attention = model(input_ids=ids[i : i + 1, :length], output_attentions=True, use_cache=False).attentions[-1]
        reference[i, :length] = attention[0].sum(1).mean(0)
    return reference.detach()


def gradient_reference(model, ids, mask, labels, k):
    """Gradient [B, T, D] of each example's own mean loss w.r.t. the input of the k-th last layer."""
    reference = torch.zeros(*ids.shape, model.get_input_embeddings().embedding_dim, dtype=model.dtype)
    for i, length in enumerate(mask.sum(1).tolist()):
        output = model(input_ids=ids[i : i + 1, :length], output_hidden_states=True, use_cache=False)
        if (labels[i, 1:] == -100).all():
            continue
        targets = labels[i, 1:length]
        # The mean is taken last: some norms have a float32 backward pass, whose rounding is then the same.
        loss = cross_entropy(output.logits[0, :-1], targets, ignore_index=-100, reduction="sum")
        # hidden_states[n] is the input of layer n; the last entry is the output of the final norm.
        (entries,) = torch.autograd.grad(loss, output.hidden_states[-1 - k])
        reference[i, :length] = entries[0] / (targets != -100).sum()
    return reference


@pytest.mark.parametrize(("kind", "attn"), SERVED)
def test_context_equals_the_column_sums_of_the_attention_map(kind, attn):
    ids, mask, labels = make_batch()
    context = TokenScorer(tiny_model(kind, attn=attn)).score(ids, mask, labels).context
    assert context.dtype == torch.float32
    assert_close(context, context_reference(kind, ids, mask, torch.float32))
    assert (context[mask == 0] == 0).all()
    if kind != "gpt_oss":  # whose sinks take their share
        assert_close(context.sum(1), mask.sum(1).float())


@pytest.mark.parametrize(("kind", "attn"), SERVED)
def test_scores_are_exact_in_float64(kind, attn, exact_softmax):
    ids, mask, labels = make_batch()
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    decoder = find_decoder(model)
    with gradient_from(decoder.layers[-1]) as leaves, attention_received(decoder, mask.bool()) as received:
        output = decoder.body(input_ids=ids, use_cache=False)
        targets = next_token_labels(labels)
        head_gradient = head_scores(decoder, output, targets, gradient=True).gradient
        gradient = loss_gradient(output, leaves[0], head_gradient, targets.ne(-100).sum(1))
    assert_close(received[0], context_reference(kind, ids, mask, torch.float64), computed_in(kind))
    assert_close(gradient, gradient_reference(model, ids, mask, labels, k=1), computed_in(kind))


@pytest.mark.parametrize("reduction", ["abs", "signed", "l2"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "granite"])
def test_gradient_equals_plain_autograd(kind, k, reduction):
    ids, mask, labels = make_batch()
    model = tiny_model(kind, dtype=torch.float64)
    scores = TokenScorer(model, gradient_layer=k, reduction=reduction).score(ids, mask, labels)
    entries = gradient_reference(model, ids, mask, labels, k)
    reduce = {"abs": lambda g: g.abs().sum(-1), "signed": lambda g: g.sum(-1), "l2": lambda g: g.norm(dim=-1)}
    # What the entries of a signed sum cancel to is as exact as they are: behind a LayerNorm that is all there is.
    beside = {"entries": entries}
    assert_close({"score": scores.gradient} | beside, {"score": reduce[reduction](entries)} | beside)
    assert (scores.gradient[mask == 0] == 0).all()
    assert torch.equal(scores.context, TokenScorer(model).score(ids, mask, labels).context)


def test_chunks_of_the_head_make_no_difference(monkeypatch):
    ids, mask, labels = make_batch()
    scorer = TokenScorer(tiny_model("llama", dtype=torch.float64))
    expected = scorer.score(ids, mask, labels).gradient
    monkeypatch.setattr("tokenseek.decoder.head.CHUNK_BYTES", 5 * 4 * VOCAB)
    assert_close(scorer.score(ids, mask, labels).gradient, expected)


def test_logits_are_held_once_and_in_chunks_of_even_size(monkeypatch):
    vocab = 2000
    monkeypatch.setattr("tokenseek.decoder.head.CHUNK_BYTES", 5 * 4 * vocab)
    monkeypatch.setattr("tokenseek.seeking.gradient.FEWEST_ROWS", 5)
    model, rows = tiny_model("llama", vocab_size=vocab), []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
    hidden = torch.randn(1, 16, model.config.hidden_size)
    targets = torch.arange(16)[None]
    body_output = BaseModelOutputWithPast(last_hidden_state=hidden)
    with LiveStorages().ignore([*model.parameters(), hidden, targets]) as live:
        head_scores(find_decoder(model), body_output, targets, losses=True, gradient=True)
    assert rows == [4, 4, 4, 4]
    assert live.peak < 1.9 * 4 * 4 * vocab  # bytes of a chunk; the gradient of the hidden states is far smaller


def test_logits_that_the_head_needs_again_are_left_alone():
    ids, mask, labels = make_batch()
    model = tiny_model("llama", dtype=torch.float64)
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())  # whose gradient is made of its output
    expected = gradient_reference(model, ids, mask, labels, k=1).abs().sum(-1).float()
    actual = TokenScorer(model).score(ids, mask, labels).gradient
    assert_close(actual, expected)


def test_sequence_scope_takes_every_token_as_a_label():
    ids, mask, labels = make_batch()
    model = tiny_model("llama", dtype=torch.float64)
    scores = TokenScorer(model, loss_scope="sequence").score(ids, mask, labels)
    everything = ids.masked_fill(mask == 0, -100)
    assert torch.equal(scores.gradient, TokenScorer(model).score(ids, mask, everything).gradient)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "opt", "qwen3_moe"])
def test_batch_mates_make_no_difference_beyond_rounding(kind):
    ids, mask, labels = make_batch()
    scorer = TokenScorer(tiny_model(kind))
    together = scorer.score(ids, mask, labels)
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = scorer.score(*(x[i : i + 1, :length] for x in (ids, mask, labels)))
        for name in ("context", "gradient"):
            assert_close(getattr(together, name)[i, :length], getattr(alone, name)[0])


def test_an_example_without_a_supervised_token_has_context_only():
    ids, mask, labels = make_batch()
    scorer = TokenScorer(tiny_model("llama"))
    full = scorer.score(ids, mask, labels)
    labels[1] = -100
    labels[2] = -100
    labels[2, 0] = ids[2, 0]  # a label that no position predicts
    partly = scorer.score(ids, mask, labels)
    assert torch.equal(partly.context, full.context)
    assert (partly.gradient[1:] == 0).all()
    assert_close(partly.gradient[0], full.gradient[0])
    nothing = scorer.score(ids, mask, torch.full_like(labels, -100))
    assert torch.equal(nothing.context, full.context) and (nothing.gradient == 0).all()


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_examples(length):
    ids, mask, labels = make_batch(lengths=(length,), prompt=0)
    scores = TokenScorer(tiny_model("llama")).score(ids, mask, labels)
    assert_close(scores.context.sum(), torch.tensor(float(length)))
    assert (scores.gradient != 0).any() == (length > 1)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_bfloat16_is_close_to_float32(kind):
    """Column sums over 400 rows keep the accuracy of their terms, not that of one bfloat16 number."""
    ids, mask, labels = make_batch(lengths=(400, 250), prompt=50)
    overrides = {"max_position_embeddings": 512, "sliding_window": 300} if kind == "gemma3" else {}
    model = tiny_model(kind, dtype=torch.bfloat16, **({"max_position_embeddings": 512} | overrides))
    half = TokenScorer(model).score(ids, mask, labels)
    # The same rounded weights, computed with in float32.
    exact = TokenScorer(copy.deepcopy(model).float()).score(ids, mask, labels)
    assert half.context.dtype == half.gradient.dtype == torch.float32
    valid = mask.bool()
    for name in ("context", "gradient"):
        ours, truth = getattr(half, name)[valid], getattr(exact, name)[valid]
        assert (ours - truth).norm() / truth.norm() < 0.03, name
        assert torch.corrcoef(torch.stack([ours, truth]))[0, 1] > 0.98, name


def test_the_model_is_left_as_it_was():
    ids, mask, labels = make_batch()
    model = tiny_model("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)

    def state():
        return (
            [module.training for module in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            [sorted(module.__dict__) for module in model.modules()],
            torch.is_grad_enabled(),
        )

    before = state()
    first = TokenScorer(model).score(ids, mask, labels)
    assert state() == before
    # Dropout was off.
    assert all(
        torch.equal(a, b) for a, b in zip(first, TokenScorer(model.eval()).score(ids, mask, labels), strict=True)
    )
    model.train()
    model.model.layers[0].eval()
    with pytest.raises(IndexError):
        TokenScorer(model).score(ids + VOCAB, mask, labels)
    assert state() == before


def test_parameters_of_layers_below_cost_no_memory():
    """No graph is kept below the chosen layer, not even where PEFT makes the embeddings' output require a gradient."""
    ids, mask, labels = make_batch()
    model = tiny_model("llama")
    model.enable_input_require_grads()
    saved = []
    layer = model.model.layers[-2]
    handle = layer.register_forward_hook(lambda module, args, output: saved.append(output.requires_grad))
    TokenScorer(model).score(ids, mask, labels)
    handle.remove()
    assert saved == [False]


def test_peft_models_are_scored_through_their_adapters():
    ids, mask, labels = make_batch()
    model = tiny_model("llama", dtype=torch.float64)
    plain = TokenScorer(model).score(ids, mask, labels)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).train()
    adapted = TokenScorer(wrapped).score(ids, mask, labels)
    assert errors(adapted.context, plain.context)[""] > 0.01
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert_close(adapted._asdict(), TokenScorer(merged).score(ids, mask, labels)._asdict())


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_4bit_models_are_scored_as_their_dequantised_weights_are(tmp_path, evaluated_before):
    """Also after an evaluation, which on some CPUs leaves weights that have no backward pass."""
    pytest.importorskip("bitsandbytes")
    ids, mask, labels = make_batch()
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=quantization)
    truth = TokenScorer(copy.deepcopy(model).dequantize()).score(ids, mask, labels)
    if evaluated_before:
        with torch.no_grad():
            model.eval()(input_ids=ids)
    scores = TokenScorer(model).score(ids, mask, labels)
    if evaluated_before:  # to the last bits of the scales
        assert max(errors(scores, truth).values()) < 0.03
    else:
        assert_close(scores, truth)


def test_two_batches_give_the_same_bits():
    ids, mask, labels = make_batch()
    scorer = TokenScorer(tiny_model("llama"))
    first = scorer.score(ids, mask, labels)
    scorer.score(*make_batch(lengths=(40,), seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, scorer.score(ids, mask, labels), strict=True))


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "mpt"])
def test_attention_outside_the_interface_is_refused(model_type):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "hidden_size": 64, "rotary_dim": 8}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=f"{type(model).__name__}.*(AttentionInterface|is not supported)"):
        TokenScorer(model).score(*make_batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_layer": 0}, "gradient_layer is 0"),
        ({"gradient_layer": 5}, r"to 4 \(the first"),
        ({"reduction": "max"}, "one of abs, signed, l2"),
        ({"loss_scope": "prompt"}, "one of response, sequence"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TokenScorer(tiny_model("llama"), **options)


def test_padding_on_the_left_is_refused():
    ids, mask, labels = make_batch()
    with pytest.raises(UserError, match="pad on the right"):
        TokenScorer(tiny_model("llama")).score(ids, mask.flip(1), labels)


def test_layers_with_several_hidden_states_per_token_are_refused():
    config = AutoConfig.for_model(
        "gemma3n_text",
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        altup_num_inputs=2,
    )
    with pytest.raises(UserError, match="passes 2 hidden states per token.*training.ditching: false"):
        TokenScorer(AutoModelForCausalLM.from_config(config)).score(*make_batch())
