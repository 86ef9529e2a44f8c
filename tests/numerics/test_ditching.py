"""The gradient of every parameter under token ditching, against Algorithm 1 computed densely in float64."""

from __future__ import annotations

import copy
from unittest import mock

import peft
import pytest
import torch
from closeness import assert_close, errors
from numerics.dense_reference import dense_loss
from tiny_models import EAGER_ONLY, KINDS, VOCAB, computed_in, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import tokenseek
from benchmarks.memory import LiveStorages
from tokenseek.decoder.find import find_decoder
from tokenseek.decoder.names import checkpoints, disable_checkpointing, enable_checkpointing
from tokenseek.ditching import ditching_of
from tokenseek.errors import UserError

SELECTED = torch.tensor([[1, 4, 5, 11], [0, 7, -1, -1]])


def make_batch(lengths=(13, 9), seed=0, left=False):
    """input_ids, attention_mask, labels [B, T]; a prompt of three tokens, padding on the right or left."""
    generator, tokens = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), tokens), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths, strict=True):
        row[tokens - length :] = 1
    if not left:
        mask = mask.flip(1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def copied(gradients):
    return {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(model, batch, selected, computed_in=None, **loss_kwargs):
    """Loss and all gradients of the patched model equal the dense reference's; returns the reference gradients."""
    reference = copy.deepcopy(model)
    if ditching_of(reference) is not None:
        tokenseek.disable_token_ditching(reference)
    disable_checkpointing(reference)  # it would take the reference's cache away
    expected_loss = dense_loss(reference, **batch, selected_positions=selected, **loss_kwargs)
    expected = gradients(reference, expected_loss)
    loss = model(**batch, selected_positions=selected, **loss_kwargs).loss
    assert_close(loss, expected_loss, computed_in)
    assert_close(gradients(model, loss), expected, computed_in)
    return expected


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize(
    "kind,attn", [(k, a) for k in KINDS for a in ("sdpa", "eager") if a == "eager" or k not in EAGER_ONLY]
)
def test_every_architecture(kind, attn, recompute, exact_softmax):
    model = tokenseek.enable_token_ditching(tiny_model(kind, attn=attn, dtype=torch.float64), recompute=recompute)
    expected = assert_same(model, make_batch(), SELECTED, computed_in(kind))
    assert sum(g.norm() > 0 for g in expected.values() if g is not None) > 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(13,), (13, 13), (13, 9)])
def test_nothing_is_read_before_it_is_written(kind, lengths, exact_softmax, uninitialized_is_nan):
    """Also where a product with zero would hide it, as of rows that the loss does not see: 0 x NaN is NaN."""
    model = tokenseek.enable_token_ditching(tiny_model(kind, attn="eager", dtype=torch.float64))
    # The last token is selected, and with the unselected ones before it every token is in one of the groups.
    selected = torch.tensor([[2, 5, 12], [0, 3, 12 if lengths[-1] == 13 else 8]])
    assert_same(model, make_batch(lengths), selected[: len(lengths)], computed_in(kind))


@pytest.mark.parametrize(
    "model_type,values",
    [
        ("gptj", dict(n_embd=16, n_layer=2, n_head=2, rotary_dim=4)),
        ("gpt_neo", dict(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]])),
    ],
)
def test_old_decoders_whose_layers_return_tuples(model_type, values):
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    assert_same(tokenseek.enable_token_ditching(model), make_batch(), SELECTED, torch.float32)  # their softmax


def test_attention_that_is_not_looked_up_although_it_seems_so(monkeypatch):
    """Without a mask it would see the future."""
    values = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = AutoConfig.for_model("falcon", vocab_size=VOCAB, **values)
    model = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr("tokenseek.ditching.state.has_attention_interface", lambda decoder: True)
    with pytest.raises(UserError, match="attn_implementation='eager'"):
        tokenseek.enable_token_ditching(model)(**make_batch((13,)), selected_positions=torch.tensor([[3, 7]]))


@pytest.mark.parametrize("lengths,left", [((13,), False), ((5, 13, 1), False), ((13, 9), True), ((7, 7), False)])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_batch_shapes(kind, lengths, left):
    batch = make_batch(lengths, left=left)
    model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    keep = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.4) & batch["attention_mask"].bool()
    keep[:, -1] |= batch["attention_mask"][:, -1].bool()
    selected = torch.full((len(lengths), int(keep.sum(1).max())), -1)
    for row, kept in zip(selected, keep, strict=True):
        row[: kept.sum()] = kept.nonzero().squeeze(1)
    assert_same(model, batch, selected)


@pytest.mark.parametrize("lengths", [(13,), (13, 9)])
def test_arguments_with_one_number_per_token_are_left_alone(lengths):
    """`cache_position` [T] is for the cache; other such arguments are cut, and refused where no row's are meant."""
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64))
    seen = []
    find_decoder(model).layers[0].register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    batch, selected = make_batch(lengths), SELECTED[: len(lengths)]
    assert_same(model, batch | dict(cache_position=torch.arange(13)), selected)
    assert "cache_position" in seen[-1]
    unknown = batch | dict(place=torch.arange(13))
    if len(lengths) == 1:
        assert_same(model, unknown, selected)
    else:
        with pytest.raises(UserError, match=r"'place' of shape \(13,\): no telling which axis"):
            model(**unknown, selected_positions=selected)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_all_tokens_selected_is_ordinary_training(kind):
    batch = make_batch((13,))
    model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64))
    logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
    ordinary = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    # Transformers' own loss is the same, but in float32.
    assert_close(model(**batch).loss.double(), ordinary, torch.float32)
    expected = copied(gradients(model, ordinary))
    ditched = model(**batch, selected_positions=torch.arange(13)[None]).loss
    assert_close(ditched, ordinary)
    assert_close(gradients(model, ditched), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3", "phi3"])
@pytest.mark.parametrize("lengths", [(120,), (120, 120), (120, 90)])
def test_many_selected_tokens(kind, lengths):
    """Enough rows for several spans of them, which attend to the keys up to their own end."""
    batch = make_batch(lengths)
    seeded = [(n, torch.Generator().manual_seed(n)) for n in lengths]
    per_example = [torch.randperm(n, generator=generator)[: n // 2].sort().values for n, generator in seeded]
    selected = torch.nn.utils.rnn.pad_sequence(per_example, batch_first=True, padding_value=-1)
    model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64))
    assert_same(model, batch, selected, computed_in(kind))


def test_the_first_step_of_a_process_computes_as_all_others_do():
    """Bit by bit, or a run that is resumed would not repeat the one that was not interrupted.

    Of 130 unselected rows, kernels for 32 of them leave a remainder of 2, which are multiplied in another way.
    """
    model, batch = tokenseek.enable_token_ditching(tiny_model("llama", max_position_embeddings=512)), make_batch((276,))
    selected = torch.arange(0, 262, 2)[None]
    first, second = [copied(gradients(model, model(**batch, selected_positions=selected).loss)) for _ in range(2)]
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def test_all_tokens_of_a_padded_batch():
    batch = make_batch((13, 9))
    selected = torch.arange(13).repeat(2, 1)
    selected[1, 9:] = -1
    assert_same(tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64)), batch, selected)


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize("kind,attn", [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma3", "sdpa")])
def test_keys_and_values_on_the_host_are_exact(kind, attn, recompute):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    tokenseek.enable_token_ditching(model, recompute=recompute, kv_storage="host")
    assert_same(model, make_batch(), SELECTED, computed_in(kind, attn))
    assert_same(model, make_batch((13,)), torch.arange(13)[None], computed_in(kind, attn))


@pytest.mark.parametrize("storage", ["int8", "int8_host"])
@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_keys_and_values_in_8_bits_leave_the_loss_and_change_gradients_a_little(recompute, storage):
    model = tokenseek.enable_token_ditching(tiny_model("llama"), recompute=recompute)
    batch = make_batch((120, 90))
    selected = torch.arange(2, 120, 3).expand(2, -1)
    selected = selected.where(selected < torch.tensor([[120], [90]]), -1)
    exact_loss = model(**batch, selected_positions=selected).loss
    exact = copied(gradients(model, exact_loss))
    tokenseek.enable_token_ditching(model, recompute=recompute, kv_storage=storage)
    loss = model(**batch, selected_positions=selected).loss
    assert torch.equal(loss, exact_loss)
    assert 0 < max(errors(gradients(model, loss), exact).values()) < 0.02


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_keys_and_values_put_away_leave_the_device(recompute):
    """What a forward pass leaves alive is less by their bytes, or, in 8 bits, by most of them."""
    model = tiny_model("llama")
    batch = dict(input_ids=torch.randint(3, VOCAB, (1, 400)))
    batch["labels"], selected = batch["input_ids"], torch.arange(0, 400, 40)[None]
    alive = {}
    for storage in ("device", "host", "int8", "int8_host"):
        tokenseek.enable_token_ditching(model, recompute=recompute, kv_storage=storage)
        with LiveStorages() as live, mock.patch("tokenseek.ditching.storage.to_host", lambda x, _: x.new_empty(0)):
            loss = model(**batch, selected_positions=selected).loss
            alive[storage] = live.bytes
        del loss
    heads, layers = model.config.num_key_value_heads * model.config.head_dim, model.config.num_hidden_layers
    numbers = 2 * 400 * heads * layers
    assert alive["device"] - alive["host"] > 0.85 * 4 * numbers
    assert alive["device"] - alive["int8_host"] > 0.85 * 4 * numbers
    assert alive["device"] - alive["int8"] > 0.85 * (4 - 1 - 4 / model.config.head_dim) * numbers


def test_packed_examples_attend_to_themselves_only():
    ids = make_batch((12,))["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    labels = ids.clone()
    labels[:, [0, 5]] = -100
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64))
    selected = torch.tensor([[1, 3, 6, 10]])
    packed = dict(input_ids=ids, labels=labels, position_ids=positions)
    assert_same(model, packed, selected)
    changed = ids.clone()
    changed[0, 2] = 3  # in the first example, not selected
    second = torch.tensor([[6, 10]])
    losses = [model(**packed | {"input_ids": i}, selected_positions=second).loss for i in (ids, changed)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
        peft.LoHaConfig(r=4, target_modules=["up_proj", "down_proj"], init_weights=False, task_type="CAUSAL_LM"),
        peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=False
        ),
    ],
    ids=["lora", "loha", "lora-and-whole-modules"],
)
@pytest.mark.parametrize("patch_first", [False, True])
def test_peft(config, patch_first):
    model = tiny_model("llama", dtype=torch.float64)
    if patch_first:
        tokenseek.enable_token_ditching(model)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    if not patch_first:
        assert tokenseek.enable_token_ditching(model) is model
    expected = assert_same(model, make_batch(), SELECTED)
    assert all("lora_" in name or "hada_" in name or "modules_to_save" in name for name in expected)


def test_transformers_gradient_checkpointing_recomputes_the_selected_pass():
    model = tokenseek.enable_token_ditching(tiny_model("llama", dtype=torch.float64)).train()
    enable_checkpointing(model)
    assert_same(model, make_batch(), SELECTED)
    calls = []
    # Before the forward: a recomputation ends as soon as it has what the backward pass needs.
    find_decoder(model).layers[1].mlp.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    model(**make_batch(), selected_positions=SELECTED).loss.backward()
    assert sorted(calls) == [4, 4, 8]  # selected rows twice, unselected rows (up to the last selected one) once
    assert all(checkpoints(layer) for layer in find_decoder(model).layers)


def test_each_row_is_computed_once_and_the_last_layer_stops_at_its_keys():
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    rows = [[] for _ in range(4)]
    for seen, layer in zip(rows, find_decoder(model).layers, strict=True):
        layer.mlp.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].shape[1]))
    model(**make_batch((13,)), selected_positions=torch.tensor([[2, 5, 6]]))
    # and what comes behind the last selected token (7 to 12) not at all
    assert [sorted(seen) for seen in rows] == [[3, 4]] * 3 + [[3]]


def test_stored_activations_grow_with_the_selected_rows_only():
    def stored(model, batch, **kwargs):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _ = model(**batch, **kwargs)  # kept, and with it its graph and all that is saved in it
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    ids = torch.randint(3, VOCAB, (1, 120))
    batch = dict(input_ids=ids, labels=ids)
    model = tokenseek.enable_token_ditching(tiny_model("llama", num_key_value_heads=1))
    selected = torch.arange(0, 120, 10)[None]
    full, ours = stored(model, batch), stored(model, batch, selected_positions=selected)
    recomputed = stored(tokenseek.enable_token_ditching(model, recompute=True), batch, selected_positions=selected)
    assert ours < 0.35 * full and recomputed < 0.6 * ours


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_bfloat16_autocast_keeps_the_gradient_of_every_weight(kind):
    """Autocast's weight cache, filled without gradient by the unselected pass, must not starve the selected pass."""
    model = tokenseek.enable_token_ditching(tiny_model(kind))
    batch = make_batch()
    expected = gradients(model, model(**batch, selected_positions=SELECTED).loss)
    expected = {name: g.clone() for name, g in expected.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, selected_positions=SELECTED).loss
    for name, gradient in gradients(model, loss).items():
        assert gradient is not None, name
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, f"{name}: cosine {cosine:.3f}"


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_step():
    model = tokenseek.enable_token_ditching(tiny_model("llama_tied", dtype=torch.float64))
    compiled = torch.compile(model, backend="aot_eager")
    for selected in (SELECTED, torch.tensor([[2, 3, 9], [1, 5, 8]])):
        batch = dict(**make_batch(), selected_positions=selected)
        expected = copied(gradients(model, model(**batch).loss))
        assert_close(gradients(model, compiled(**batch).loss), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_logits_of_selected_rows_without_labels():
    model = tokenseek.enable_token_ditching(tiny_model("gemma2", attn="eager"))
    batch = make_batch((13,))
    del batch["labels"]
    selected = torch.tensor([[2, 5, 12]])
    logits = model(**batch, selected_positions=selected).logits
    assert_close(logits, model(**batch).logits[:, selected[0]])


def test_without_selected_positions_and_after_disabling_the_model_is_what_it_was():
    plain, batch = tiny_model("llama"), make_batch()
    model = copy.deepcopy(plain)
    before = {id(m): set(m.__dict__) for m in model.modules()}
    tokenseek.enable_token_ditching(model)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model(**batch, num_items_in_batch=5).loss, plain(**batch, num_items_in_batch=5).loss)
    generated = dict(max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(batch["input_ids"], **generated), plain.generate(batch["input_ids"], **generated))
    tokenseek.disable_token_ditching(model)
    assert {id(m): set(m.__dict__) for m in model.modules()} == before
    with pytest.raises(UserError, match="not enabled"):
        tokenseek.disable_token_ditching(model)


def test_a_copy_of_a_patched_model_is_its_own():
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.weight.data.zero_()
    batch = make_batch()
    losses = [m(**batch, selected_positions=SELECTED).loss for m in (model, other)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "positions,message",
    [
        (torch.tensor([[1, 13], [0, 1]]), "outside the 13 tokens"),
        (torch.tensor([[5, 4], [0, 1]]), "not ascending"),
        (torch.tensor([[4, 4], [0, 1]]), "not ascending"),
        (torch.tensor([[-1, 4], [0, 1]]), "not ascending"),
        (torch.tensor([[-2, 4], [0, 1]]), "not ascending"),
        (torch.tensor([[1, 2], [0, 9]]), "point at padding"),
        (torch.tensor([[1, 2]]), "do not fit"),
        (torch.tensor([1, 2]), r"expected \[B, S\] int64"),
        (torch.tensor([[1.0], [2.0]]), r"expected \[B, S\] int64"),
    ],
)
def test_wrong_positions_are_named(positions, message):
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    with pytest.raises(UserError, match=message):
        model(**make_batch(), selected_positions=positions)
    assert model(**make_batch()).loss.isfinite()  # and the model is none the worse for it
