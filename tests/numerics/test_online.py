"""Scoring, selection and back-propagation in one step, against Algorithm 1 computed densely in float64."""

import copy
import gc

import numpy as np
import peft
import pytest
import torch
from closeness import assert_close
from numerics.dense_reference import dense_loss
from numerics.test_ditching import copied, gradients, make_batch
from tiny_models import EAGER_ONLY, KINDS, computed_in, tiny_model

import tokenseek
from tokenseek import SelectionRule, UserError
from tokenseek.decoder.find import find_decoder
from tokenseek.decoder.names import disable_checkpointing
from tokenseek.ditching import Seeking
from tokenseek.seeking import TokenScorer
from tokenseek.selection import select_weighted, supervised_positions
from tokenseek.selection.batched import draw_key

DRAWN = SelectionRule("sampled", ratio=0.3, alpha=0, beta=1, explore=0.3, scope="supervised")
KEYS = torch.tensor([draw_key(7, 0), draw_key(8, 3)])


def enabled(model, **options):
    return tokenseek.enable_token_ditching(model, **options)


def assert_same(model, batch, rule=DRAWN, keys=KEYS, computed_in=None, exact_layers=0, **given):
    """Loss and all gradients equal the dense reference's for the positions that were chosen.

    Exact layers are gone through before the loss is divided, and norms of float32 round by that: not by a power of two.
    """
    if exact_layers and computed_in != torch.float32:
        given.setdefault("num_items_in_batch", 16)
    output = model(**batch, selection=rule, selection_keys=keys[: len(batch["input_ids"])], **given)
    actual = gradients(model, output.loss)
    reference = copy.deepcopy(model)
    tokenseek.disable_token_ditching(reference)
    disable_checkpointing(reference)
    supervised = batch["labels"][:, 1:].ne(-100).sum()
    expected_loss = dense_loss(
        reference,
        **batch,
        selected_positions=output.selected_positions,
        selected_weights=output.selected_weights,
        num_items_in_batch=given.get("num_items_in_batch", supervised),
        exact_layers=exact_layers,
    )
    expected = gradients(reference, expected_loss)
    assert_close(output.loss, expected_loss, computed_in)
    assert_close(actual, expected, computed_in)
    assert any(g is not None and g.any() for g in expected.values())
    return output


@pytest.mark.parametrize("exact_layers", [0, 1, "all"])
@pytest.mark.parametrize(
    "kind,attn", [(k, a) for k in KINDS for a in ("sdpa", "eager") if a == "eager" or k not in EAGER_ONLY]
)
def test_every_architecture(kind, attn, exact_layers):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    layers = len(find_decoder(model).layers) if exact_layers == "all" else exact_layers
    enabled(model, seeking=Seeking("l2", exact_layers=layers))
    assert_same(model, make_batch(), computed_in=computed_in(kind, attn), exact_layers=layers)


@pytest.mark.parametrize("exact_layers", [0, 1])
@pytest.mark.parametrize("lengths,left", [((13,), False), ((5, 13), False), ((13, 9), True), ((120, 90), False)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_batch_shapes(kind, lengths, left, exact_layers):
    model = enabled(tiny_model(kind, dtype=torch.float64), seeking=Seeking("l2", exact_layers=exact_layers))
    batch = make_batch(lengths, left=left)
    first = batch["attention_mask"].argmax(1, keepdim=True)
    batch["labels"].scatter_(1, first, -100)  # padding before it does not predict it
    assert_same(model, batch, exact_layers=exact_layers)


@pytest.mark.parametrize("exact_layers", [0, 1])
@pytest.mark.parametrize(
    "options", [dict(recompute=True), dict(kv_storage="host"), dict(recompute=True, kv_storage="host")]
)
def test_recompute_and_storage(options, exact_layers):
    model = enabled(
        tiny_model("llama", dtype=torch.float64), seeking=Seeking("l2", exact_layers=exact_layers), **options
    )
    assert_same(model, make_batch(), exact_layers=exact_layers)


@pytest.mark.parametrize("prompt", [3, 7], ids=["most-supervised", "few-supervised"])
@pytest.mark.parametrize("exact_layers", [0, 1])
def test_a_step_leaves_no_tensor_for_the_garbage_collector(exact_layers, prompt):
    """Which would run some time, and many steps' keys and values would wait for it."""
    model = enabled(tiny_model("llama"), seeking=Seeking("l2", exact_layers=exact_layers))
    batch = make_batch()
    batch["labels"][:, :prompt] = -100

    def step():
        model(**batch, selection=DRAWN, selection_keys=KEYS).loss.backward()

    step()  # makes what lives on
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        step()
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("exact_layers", [0, 1])
def test_adapters_and_tied_weights(exact_layers):
    seeking = Seeking("l2", exact_layers=exact_layers)
    tied = tiny_model("llama", dtype=torch.float64, tie_word_embeddings=True)
    assert_same(enabled(tied, seeking=seeking), make_batch(), exact_layers=exact_layers)
    adapted = peft.get_peft_model(
        tiny_model("llama", dtype=torch.float64), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).double()
    assert_same(enabled(adapted, seeking=seeking), make_batch(), exact_layers=exact_layers)
    modules = ["q_proj", "v_proj", "up_proj", "down_proj"]
    products = peft.LoHaConfig(r=4, target_modules=modules, init_weights=False)
    adapted = peft.get_peft_model(tiny_model("llama", dtype=torch.float64), products).double()
    assert_same(enabled(adapted, seeking=seeking), make_batch(), exact_layers=exact_layers)


@pytest.mark.parametrize(
    "rule",
    [
        SelectionRule("top", ratio=0.3),
        SelectionRule("top", ratio=0.3, scope="supervised", alpha=0),
        SelectionRule("random", ratio=0.3, seed=5),
        SelectionRule("all"),
        SelectionRule("all", scope="supervised"),
        SelectionRule("bands", bands=((0, 0.2), (0.5, 0.7))),
        SelectionRule("top_random", ratio=0.4, explore=0.5),
        SelectionRule("sampled", ratio=0.4, alpha=5, beta=5, scope="all"),
    ],
    ids=lambda rule: f"{rule.rule}-{rule.scope}",
)
@pytest.mark.parametrize("reduction", ["abs", "error"])
def test_rules_select_as_they_do_from_an_index(rule, reduction):
    model, batch = tiny_model("llama", dtype=torch.float64), make_batch()
    scores = TokenScorer(model).score(**batch)
    output = assert_same(enabled(model, seeking=Seeking(reduction)), batch, rule)
    for row, key in enumerate(KEYS.tolist()):
        length = int(batch["attention_mask"][row].sum())
        has_loss = supervised_positions(batch["labels"][row, :length])
        own = [s[row, :length].numpy() for s in scores]
        if reduction == "error":
            logits = copy.deepcopy(model)(input_ids=batch["input_ids"]).logits[row, : length - 1]
            error = logits.softmax(-1) - torch.nn.functional.one_hot(
                batch["input_ids"][row, 1:length], logits.shape[-1]
            )
            own[1] = np.append(error.norm(dim=-1).detach().numpy(), 0) * has_loss
        positions, weights = select_weighted(rule, *own, row=key & 0xFFFFFFFF, visit=key >> 32, supervised=has_loss)
        chosen = output.selected_positions[row]
        assert chosen[chosen >= 0].tolist() == positions.tolist()
        if rule.has_weights:
            assert_close(output.selected_weights[row, : len(weights)], weights, torch.float32)
    with torch.no_grad():
        targets = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        ordinary = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(output.loss_all, ordinary)


@pytest.mark.parametrize("tile_rows", ["auto", 4])
@pytest.mark.parametrize("exact_layers", [0, 1])
@pytest.mark.parametrize("kind,attn", [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")])
@pytest.mark.parametrize("lengths", [(13, 9), (9, 13)], ids=["longest-first", "longest-last"])
def test_packed_examples_are_selected_and_trained_alone(lengths, kind, attn, exact_layers, tile_rows):
    """A row of several examples gives the loss and the gradients of a batch of them."""
    batch = make_batch(lengths)
    model = enabled(
        tiny_model(kind, attn=attn, dtype=torch.float64),
        seeking=Seeking("l2", exact_layers=exact_layers),
        tile_rows=tile_rows,
    )
    padded = model(**batch, selection=DRAWN, selection_keys=KEYS)
    expected = copied(gradients(model, padded.loss))
    row = {
        "input_ids": torch.cat([batch["input_ids"][i, :n] for i, n in enumerate(lengths)])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "labels": torch.cat([batch["labels"][i, :n] for i, n in enumerate(lengths)])[None],
    }
    packed = model(**row, selection=DRAWN, selection_keys=KEYS)
    actual = gradients(model, packed.loss)
    lowest = torch.float32 if attn == "eager" else torch.float64
    assert_close([packed.loss, packed.loss_all], [padded.loss, padded.loss_all], lowest)
    assert_close(actual, expected, lowest)


def test_accumulation_and_weights_make_an_unbiased_loss():
    """The sum of the micro batches' losses over the number of all supervised tokens has the mean of the loss of all."""
    model, batch = enabled(tiny_model("llama", dtype=torch.float64), seeking=Seeking("l2")), make_batch()
    total = batch["labels"][:, 1:].ne(-100).sum()
    losses = []
    with torch.no_grad():
        for visit in range(300):
            keys = [torch.tensor([draw_key(example, visit)]) for example in (1, 2)]
            parts = [{name: values[[row]] for name, values in batch.items()} for row in (0, 1)]
            outputs = [
                model(**part, selection=DRAWN, selection_keys=key, num_items_in_batch=total)
                for part, key in zip(parts, keys, strict=True)
            ]
            losses.append(sum(output.loss for output in outputs))
        whole = model(**batch, selection=DRAWN, selection_keys=KEYS).loss_all
    losses = torch.stack(losses)
    assert (losses.mean() - whole).abs() < 4 * losses.std() / len(losses) ** 0.5


def test_exact_layers_have_the_gradient_of_all_tokens_on_average():
    """On the average of many draws among all tokens, below the border as well but for the cut keys and values."""
    model = tiny_model("llama", dtype=torch.float64)
    layers = len(find_decoder(model).layers)
    rule = SelectionRule("sampled", ratio=0.5, explore=0.5, scope="all")
    enabled(model, seeking=Seeking("l2", exact_layers=layers))
    batch = make_batch((19,))  # a loss of 16 tokens: norms of float32 round alike before and after a division by it
    ordinary = copy.deepcopy(model)
    tokenseek.disable_token_ditching(ordinary)
    logits = ordinary(input_ids=batch["input_ids"]).logits
    full = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    expected = gradients(ordinary, full)
    drawn = []
    for visit in range(400):
        output = model(**batch, selection=rule, selection_keys=torch.tensor([draw_key(1, visit)]))
        drawn.append(copied(gradients(model, output.loss)))
    assert_close(output.loss, full)  # of all tokens
    for name, gradient in expected.items():
        own = torch.stack([gradients_of[name] for gradients_of in drawn])
        if "embed" not in name:  # every layer is exact: no draw in it
            assert_close(own[-1], gradient)
        else:
            spread = own.std(0).norm() / len(own) ** 0.5
            assert 0 < (own.mean(0) - gradient).norm() < 4 * spread, name


def test_draws_depend_on_the_key_alone():
    model, batch = enabled(tiny_model("llama", dtype=torch.float64)), make_batch((13, 13))
    first = model(**batch, selection=DRAWN, selection_keys=KEYS)
    swapped = model(**{name: v.flip(0) for name, v in batch.items()}, selection=DRAWN, selection_keys=KEYS.flip(0))
    assert torch.equal(first.selected_positions, swapped.selected_positions.flip(0))
    again = model(**batch, selection=DRAWN, selection_keys=KEYS + (1 << 32))
    assert not torch.equal(first.selected_positions, again.selected_positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Weights' 16-bit copies of the pass without gradient do not serve the other."""
    model, batch = enabled(tiny_model("llama")), make_batch()
    with torch.autocast("cpu", dtype):
        output = model(**batch, selection=DRAWN, selection_keys=KEYS)
    actual = gradients(model, output.loss)
    plain = model(**batch, selection=DRAWN, selection_keys=KEYS)
    expected = gradients(model, plain.loss)
    assert all(gradient is not None for gradient in actual.values())
    if torch.equal(output.selected_positions, plain.selected_positions):
        for name, gradient in expected.items():
            assert (actual[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_a_batch_without_a_loss_keeps_the_graph_alive():
    model, batch = enabled(tiny_model("llama", dtype=torch.float64)), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for exact_layers in (0, 1):
        enabled(model, seeking=Seeking("l2", exact_layers=exact_layers))
        output = model(**batch, selection=DRAWN, selection_keys=KEYS)
        assert output.loss == 0 and output.loss_all == 0
        assert all(g is not None and not g.any() for g in gradients(model, output.loss).values())


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(selected_positions=torch.tensor([[1], [2]])), "selection and selected_positions are both given"),
        (dict(selection_keys=torch.tensor([1])), "selection_keys are 1 for 2 examples"),
        (dict(selection_keys=None), "without selection_keys"),
        (dict(labels=None), "selection is given without labels"),
    ],
)
def test_bad_input(change, message):
    model = enabled(tiny_model("llama"))
    with pytest.raises(UserError, match=message):
        model(**{**make_batch(), "selection": DRAWN, "selection_keys": KEYS, **change})


def test_bad_settings():
    for options, message in (
        (dict(reduction="sum"), "reduction is 'sum'"),
        (dict(gradient_layer=0), "gradient_layer is 0"),
        (dict(exact_layers=-1), "exact_layers is -1"),
        (dict(reduction="error", exact_layers=1), "knows no gradient"),
    ):
        with pytest.raises(UserError, match=message):
            Seeking(**options)
    model = enabled(tiny_model("llama"), seeking=Seeking(exact_layers=99))
    with pytest.raises(UserError, match="exact_layers is 99, and LlamaForCausalLM has"):
        model(**make_batch(), selection=DRAWN, selection_keys=KEYS)
    model = enabled(tiny_model("llama"), seeking=Seeking(exact_layers=1))
    with pytest.raises(UserError, match="exact_layers is 1 with rule 'top'"):
        model(**make_batch(), selection=SelectionRule("top"), selection_keys=KEYS)


@pytest.mark.parametrize("rule, exact_layers", [(SelectionRule(), 1), (SelectionRule("top", ratio=0.3), 0)], ids=str)
def test_where_nobody_says_how_one_layer_is_exact_if_the_rule_allows_it(rule, exact_layers):
    model = enabled(tiny_model("llama", dtype=torch.float64))
    assert_same(model, make_batch(), rule, exact_layers=exact_layers)


def test_nor_is_one_where_layers_share_keys_and_values():
    assert_same(enabled(tiny_model("gemma4")), make_batch(), SelectionRule())


def test_scores_that_are_not_finite_name_the_example():
    model = enabled(tiny_model("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="example 0 of the batch .*not finite"):
        model(**make_batch(), selection=DRAWN, selection_keys=KEYS)
