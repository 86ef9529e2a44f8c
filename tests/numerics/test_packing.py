"""A packed batch is its padded batch: the same loss and the same gradients, in float64, without a token of padding."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import gradients
from tiny_models import EAGER_ONLY, KINDS, VOCAB, computed_in, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import tokenseek
from tokenseek import TokenSeekCollator
from tokenseek.decoder.find import find_decoder
from tokenseek.decoder.masks import SlidingWindow
from tokenseek.ditching.packing import require_packable
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED

EVERY = [(k, a) for k in KINDS for a in ("sdpa", "eager") if a == "eager" or k not in EAGER_ONLY]


def examples(lengths=(13, 7, 16), prompts=(4, 0, 9), seed=0):
    generator = np.random.default_rng(seed)
    rows = [generator.integers(3, VOCAB, length) for length in lengths]
    return [
        {"example_id": f"{i}", "input_ids": ids, "labels": np.where(np.arange(len(ids)) < prompt, IGNORED, ids)}
        for i, (ids, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]


def batches(rows, ratio=0.3, rule="random"):
    return [TokenSeekCollator(None, ratio, rule, packing=packing)(rows) for packing in (False, True)]


def assert_same(model, rows, kind="llama", **options):
    precision = computed_in(kind, find_decoder(model).causal_lm.config._attn_implementation)
    padded, packed = batches(rows, **options)
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    expected_loss = model(**padded).loss
    expected = {name: None if g is None else g.clone() for name, g in gradients(model, expected_loss).items()}
    loss = model(**packed).loss
    assert_close(loss, expected_loss, precision)
    assert_close(gradients(model, loss), expected, precision)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("tile_rows", ["auto", 5])
@pytest.mark.parametrize("kind,attn", EVERY)
def test_every_architecture(kind, attn, tile_rows):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    assert_same(tokenseek.enable_token_ditching(model, tile_rows=tile_rows), examples(), kind)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "rows,options",
    [
        (examples(), dict(rule="all")),
        (examples((13,), (4,)), {}),
        (examples((13, 1, 1, 9), (4, 0, 1, 2)), dict(ratio=0.5)),
        (examples((9, 13), (9, 3)), {}),
        (examples((120, 90, 7), (0, 30, 2)), dict(ratio=0.5)),
    ],
    ids=["all-tokens", "one-example", "examples-of-one-token", "an-example-without-loss", "many-selected-tokens"],
)
def test_batches(kind, attn, rows, options):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    for tiles in ({}, dict(tile_rows=1), dict(tile_rows=4, recompute=True)):
        assert_same(tokenseek.enable_token_ditching(model, **tiles), rows, **options)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_lora_with_recompute(attn):
    model = tiny_model("llama", attn=attn, dtype=torch.float64)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    assert_same(tokenseek.enable_token_ditching(model, recompute=True), examples())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("selected", [[3, 5], [15, 17, 19], []], ids=["first", "second", "none"])
def test_examples_without_selected_tokens(attn, selected):
    """Positions given by hand: the collator selects at least one of every example."""
    model = tokenseek.enable_token_ditching(tiny_model("llama", attn=attn, dtype=torch.float64))
    padded, packed = batches(examples((13, 9), (0, 0)))
    for batch in (padded, packed):
        del batch["shift_labels"]
        batch["labels"] = batch["input_ids"].clone()
    packed["labels"][0, [0, 13]] = IGNORED
    packed["selected_positions"] = torch.tensor([selected], dtype=torch.int64)
    rows = [[p for p in selected if p < 13], [p - 13 for p in selected if p >= 13]]
    longest = max(map(len, rows))
    padded["selected_positions"] = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int64)
    losses = [model(**batch).loss for batch in (padded, packed)]
    assert_close(losses[1], losses[0], computed_in("llama", attn))
    padded_gradients, packed_gradients = (copy.deepcopy(gradients(model, loss)) for loss in losses)
    assert_close(packed_gradients, padded_gradients, computed_in("llama", attn))


@pytest.mark.parametrize("kind,masks", [("llama", [None]), ("mistral", [SlidingWindow(5)])])
def test_no_mask_of_the_whole_row_is_made_and_no_row_is_computed_in_vain(kind, masks):
    model = tokenseek.enable_token_ditching(tiny_model(kind))
    layer, seen, rows = find_decoder(model).layers[1], [], []
    layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    _, packed = batches(examples((13, 4, 40), (0, 0, 0)))
    del packed["shift_labels"]
    model(**packed | {"selected_positions": torch.tensor([[2, 5, 19, 20]])})
    assert seen == masks
    assert sorted(rows) == [4, 6]  # up to the last selected token of each example: 6, none and 4


def without_position_ids():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=16, n_layer=2, n_head=2))


def own_masks():
    """A model that is not Transformers' own: its masks come from elsewhere."""
    model = tiny_model("llama")
    original = type(model.model).forward

    class OwnMasks(type(model.model)):
        def forward(self, attention_mask=None, position_ids=None, **kwargs):
            mask = torch.ones(kwargs["inputs_embeds"].shape[1], kwargs["inputs_embeds"].shape[1], dtype=torch.bool)
            return original(self, attention_mask=mask.tril()[None, None], position_ids=position_ids, **kwargs)

    model.model.__class__ = OwnMasks
    return model


@pytest.mark.parametrize(
    "build,message", [(without_position_ids, "takes no position_ids"), (own_masks, "masks in code of its own")]
)
def test_models_that_cannot_tell_examples_apart_are_refused(build, message):
    with pytest.raises(UserError, match=f"{message}.*training.packing: false"):
        require_packable(find_decoder(build()))
    model = tokenseek.enable_token_ditching(build())
    padded, packed = batches(examples())
    embeddings = model.get_input_embeddings()
    padded, packed = (b | {"inputs_embeds": embeddings(b.pop("input_ids"))} for b in (padded, packed))
    with pytest.raises(UserError, match=f"{message}.*training.packing: false"):
        model(**packed)
    assert model(**padded).loss.isfinite()  # and the model is none the worse for it


@pytest.mark.parametrize("kind,attn", EVERY)
def test_models_are_found_packable_without_weights(kind, attn):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model(kind, attn=attn).config, attn_implementation=attn)
    require_packable(find_decoder(model))
