"""The last layer of the first pass runs over supervised tokens, where these are few: against the dense reference."""

import peft
import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import copied, gradients, make_batch
from numerics.test_online import DRAWN, KEYS, assert_same, enabled
from tiny_models import EAGER_ONLY, HYBRIDS, KINDS, computed_in, tiny_model

from tokenseek import SelectionRule
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import Seeking, last_layer

SCORED = [("l2", 0), ("l2", 1), ("l2", 2), ("error", 0)]
SCORED_IDS = [f"{reduction}-{exact}" for reduction, exact in SCORED]


def few_supervised(lengths=(13, 9), left=False, kept=slice(-4, None)):
    """A batch in which a few tokens of each example carry a loss."""
    batch = make_batch(lengths, left=left)
    for row, (mask, labels) in enumerate(zip(batch["attention_mask"], batch["labels"], strict=True)):
        own = mask.nonzero().squeeze(1)
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        chosen[own[kept]] = True
        batch["labels"][row] = labels.masked_fill(~chosen, -100)
    return batch


@pytest.fixture
def rows_run(monkeypatch):
    """Of each call of the last layer's code, how many rows came to its end."""
    counts = []

    class Noted(last_layer.LayerCode):
        def __call__(self, hidden_BRD, *given):
            output = super().__call__(hidden_BRD, *given)
            counts.append(hidden_BRD.shape[1])
            return output

    monkeypatch.setattr(last_layer, "LayerCode", Noted)
    return counts


@pytest.mark.parametrize("reduction,exact_layers", SCORED, ids=SCORED_IDS)
@pytest.mark.parametrize(
    "kind,attn", [(k, a) for k in KINDS for a in ("sdpa", "eager") if a == "eager" or k not in EAGER_ONLY]
)
def test_every_architecture(kind, attn, reduction, exact_layers, rows_run):
    model = tiny_model(kind, attn=attn, dtype=torch.float64)
    enabled(model, seeking=Seeking(reduction, exact_layers=exact_layers))
    assert_same(model, few_supervised(), computed_in=computed_in(kind, attn), exact_layers=exact_layers)
    decoder = find_decoder(model)
    has_own = decoder.layers[-1] not in decoder.sharing and decoder.layers[-1] not in decoder.mixers
    assert rows_run == ([4] if has_own else [])  # the others end at their keys


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids(kind):
    model = enabled(tiny_model(kind, dtype=torch.float64), seeking=Seeking("error"))
    assert_same(model, few_supervised(), computed_in=computed_in(kind))


@pytest.mark.parametrize("reduction,exact_layers", SCORED, ids=SCORED_IDS)
@pytest.mark.parametrize(
    "batch",
    [
        few_supervised((13,)),
        few_supervised((5, 13), kept=slice(2, 4)),
        few_supervised((13, 9), left=True),
        few_supervised((120, 90), kept=slice(-60, None, 2)),
        few_supervised((13, 9), kept=slice(4, 6)),
    ],
    ids=["one", "lengths", "left", "many", "middle"],
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_batch_shapes(kind, batch, reduction, exact_layers, rows_run):
    model = enabled(tiny_model(kind, dtype=torch.float64), seeking=Seeking(reduction, exact_layers=exact_layers))
    assert_same(model, batch, exact_layers=exact_layers)
    assert rows_run


def test_an_example_without_a_loss_beside_one_with():
    model = enabled(tiny_model("llama", dtype=torch.float64), seeking=Seeking("l2", exact_layers=1))
    batch = few_supervised()
    batch["labels"][1] = -100
    assert_same(model, batch, exact_layers=1)


@pytest.mark.parametrize("scope", ["all", "supervised"])
@pytest.mark.parametrize("rule", ["random", "all", "sampled", "top"])
def test_rules(rule, scope):
    """Tokens behind the last supervised one may be selected too; no loss depends on them."""
    chosen = SelectionRule(rule, ratio=0.4, alpha=0, beta=1, scope=scope)
    model = enabled(tiny_model("llama", dtype=torch.float64), seeking=Seeking("l2"))
    assert_same(model, few_supervised(kept=slice(3, 6)), chosen)


@pytest.mark.parametrize("reduction,exact_layers", SCORED, ids=SCORED_IDS)
@pytest.mark.parametrize("kind,attn", [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")])
def test_packed_examples(kind, attn, reduction, exact_layers, rows_run):
    """A row of several examples gives the losses of a batch of them, whose gradients are compared above."""
    lengths = (13, 9, 7)
    batch, keys = few_supervised(lengths), torch.tensor([5, 6, 7])
    model = enabled(
        tiny_model(kind, attn=attn, dtype=torch.float64), seeking=Seeking(reduction, exact_layers=exact_layers)
    )
    padded = model(**batch, selection=DRAWN, selection_keys=keys)
    row = {
        "input_ids": torch.cat([batch["input_ids"][i, :n] for i, n in enumerate(lengths)])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "labels": torch.cat([batch["labels"][i, :n] for i, n in enumerate(lengths)])[None],
    }
    rows_run.clear()
    packed = model(**row, selection=DRAWN, selection_keys=keys)
    assert rows_run == ([12] if attn == "sdpa" else [])  # a mask tells examples apart, for eager attention
    lowest = torch.float32 if attn == "eager" else torch.float64
    expected, actual = (copied(gradients(model, output.loss)) for output in (padded, packed))
    assert_close([packed.loss, packed.loss_all], [padded.loss, padded.loss_all], lowest)
    assert_close(actual, expected, lowest)


@pytest.mark.parametrize("exact_layers", [0, 1])
@pytest.mark.parametrize("options", [dict(recompute=True), dict(kv_storage="host"), dict(tile_rows=4)], ids=str)
def test_options(options, exact_layers):
    model = enabled(
        tiny_model("llama", dtype=torch.float64), seeking=Seeking("l2", exact_layers=exact_layers), **options
    )
    assert_same(model, few_supervised(), exact_layers=exact_layers)


def test_adapters():
    adapted = peft.get_peft_model(
        tiny_model("llama", dtype=torch.float64), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).double()
    assert_same(enabled(adapted, seeking=Seeking("l2", exact_layers=1)), few_supervised(), exact_layers=1)


def test_many_supervised_tokens_run_as_all_do(rows_run):
    model = enabled(tiny_model("llama", dtype=torch.float64), seeking=Seeking("l2", exact_layers=1))
    assert_same(model, make_batch((13, 13)), exact_layers=1)
    assert rows_run == []


def test_scores_by_attention_are_those_of_all_tokens(rows_run):
    """Eq. 3 sums what every token looks at."""
    rule = SelectionRule("sampled", ratio=0.4, alpha=5, beta=5, scope="all")
    model = enabled(tiny_model("llama", dtype=torch.float64), seeking=Seeking("l2"))
    assert_same(model, few_supervised(), rule, KEYS)
    assert rows_run == []
