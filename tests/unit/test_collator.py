"""Batches of the collator: which tokens are selected, which labels are left, and what is refused."""

import pickle

import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from tiny_models import tiny_model
from tiny_run import tiny_dataset, write_index
from torch.utils.data import DataLoader

from tokenseek import PaddingCollator, SelectionRule, TokenIndex, TokenSeekCollator, UserError
from tokenseek.ditching import enable_token_ditching
from tokenseek.runs.summary import Selected
from tokenseek.selection import select_positions


@pytest.fixture(scope="module")
def dataset():
    return tiny_dataset()


@pytest.fixture(scope="module")
def path(dataset, tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("index") / "index.arrow", dataset)


def valid(row):
    return row[row >= 0].tolist()


def test_a_batch_holds_every_example_and_its_selected_positions(dataset, path):
    examples = list(dataset)[2:5]
    batch = TokenSeekCollator(path, 0.3, "top", pad_token_id=9)(examples)
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "selected_positions", "shift_labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    index = TokenIndex.open(path)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row].tolist() == example["input_ids"] + [9] * (17 - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (17 - length)
        expected = select_positions(SelectionRule("top", ratio=0.3), *index.scores(row + 2), row=row + 2)
        assert valid(batch["selected_positions"][row]) == expected.tolist()
    assert batch["selected_positions"].shape == (3, 5)  # 14, 6 and 17 tokens
    assert batch["selected_positions"][1].tolist()[2:] == [-1] * 3


def test_labels_are_left_where_a_selected_position_predicts_them_and_nowhere_else(dataset, path):
    examples = list(dataset)
    batch = TokenSeekCollator(path, 0.3, "top")(examples)
    left = 0
    for row, example in enumerate(examples):
        predicted = {position + 1 for position in valid(batch["selected_positions"][row])}
        for token, label in enumerate(batch["labels"][row].tolist()):
            given = example["labels"][token] if token < len(example["labels"]) else -100
            assert label == (given if token in predicted else -100)
            left += label != -100
    assert 0 < left < (batch["selected_positions"] >= 0).sum()  # some selected positions carry no loss


def test_the_first_label_never_counts_and_the_last_position_predicts_nothing():
    example = {"example_id": "a", "input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    batch = TokenSeekCollator(None, rule="all")([example])
    assert batch["selected_positions"].tolist() == [[0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7]]
    assert batch["shift_labels"].tolist() == [[6, 7, -100]]


def test_an_example_of_one_token():
    batch = TokenSeekCollator(None, rule="all")([{"example_id": "a", "input_ids": [5], "labels": [5]}])
    assert batch["selected_positions"].tolist() == [[0]] and batch["labels"].tolist() == [[-100]]


def test_shift_labels_are_the_labels_that_selected_positions_predict(dataset, path):
    batch = TokenSeekCollator(path, 0.3, "top")(list(dataset))
    shifted, positions, labels = batch["shift_labels"], batch["selected_positions"], batch["labels"]
    assert shifted.shape == positions.shape
    following = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], dim=1)
    expected = following.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, -100)
    assert torch.equal(shifted, expected)
    # Either way Trainer counts the same number of losses.
    assert shifted.ne(-100).sum() == labels[:, 1:].ne(-100).sum() > 0


@pytest.mark.parametrize("multiple,tokens", [(1, 21), (8, 24), (21, 21), (64, 64)])
def test_pad_to_multiple_of(dataset, path, multiple, tokens):
    examples = list(dataset)[:2]
    batch = TokenSeekCollator(path, 0.3, "top", pad_to_multiple_of=multiple)(examples)
    assert [batch[name].shape[1] for name in ("input_ids", "attention_mask", "labels")] == [tokens] * 3
    assert batch["attention_mask"].sum() == 9 + 21
    assert (batch["labels"][:, 21:] == -100).all() and batch["selected_positions"].shape[1] == 6


def test_packed_examples_stand_one_behind_the_other(dataset, path):
    examples = list(dataset)[2:5]
    padded, packed = (TokenSeekCollator(path, 0.3, "top", packing=packing)(examples) for packing in (False, True))
    assert packed.keys() == {"input_ids", "position_ids", "labels", "selected_positions", "shift_labels"}
    is_token, is_chosen = padded["attention_mask"].bool(), padded["selected_positions"] >= 0
    for name, kept in (("input_ids", is_token), ("labels", is_token), ("shift_labels", is_chosen)):
        assert torch.equal(packed[name], padded[name][kept][None]), name
    assert packed["position_ids"].tolist() == [[*range(14), *range(6), *range(17)]]
    moved = padded["selected_positions"] + torch.tensor([[0], [14], [20]])
    assert torch.equal(packed["selected_positions"], moved[is_chosen][None])
    # No example's first token is predicted, whatever its label.
    first = TokenSeekCollator(None, rule="all", packing=True)([{**e, "labels": e["input_ids"]} for e in examples])
    assert first["labels"][0, [0, 14, 20]].tolist() == [-100] * 3
    assert first["shift_labels"][0, [13, 19, 36]].tolist() == [-100] * 3


def test_packing_pads_nothing(path):
    with pytest.raises(UserError, match="pad_to_multiple_of=8, but packing=True"):
        TokenSeekCollator(path, rule="top", packing=True, pad_to_multiple_of=8)


def test_evaluation_sees_all_labels(dataset, path):
    collator = TokenSeekCollator(path, 0.3, "top", pad_token_id=9, pad_to_multiple_of=8).without_selection()
    batch = collator(list(dataset)[:2])
    packing = TokenSeekCollator(path, rule="top", packing=True).without_selection()
    assert packing(list(dataset)[:2]).keys() == batch.keys()
    assert type(collator) is PaddingCollator and batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"][0].tolist() == dataset[0]["labels"] + [-100] * 15
    assert batch["input_ids"][0, 9:].tolist() == [9] * 15


def test_a_rule_and_its_options(path):
    rule = SelectionRule("top_random", ratio=0.2, explore=0.5)
    assert TokenSeekCollator(path, 0.4, rule, seed=3).rule == SelectionRule("top_random", 0.4, explore=0.5, seed=3)
    assert TokenSeekCollator(path, rule=rule).rule == rule
    assert TokenSeekCollator(path, rule="bands", bands=[[0, 0.1]]).rule.bands == ((0.0, 0.1),)
    with pytest.raises(UserError, match=r"ratio is 0; accepted is a share in \(0, 1\]"):
        TokenSeekCollator(path, 0, "top")


@pytest.mark.parametrize("rule", ["top", "bands", "top_random"])
def test_rules_that_need_scores_need_an_index(rule):
    options = {"bands": {"bands": [[0, 0.1]]}, "top_random": {"explore": 0.5}}.get(rule, {})
    with pytest.raises(UserError, match=f"{rule}.*needs an index"):
        TokenSeekCollator(None, rule=rule, online=False, **options)
    assert TokenSeekCollator(None, rule=rule, **options).online  # the model scores where nothing is said


def test_two_words_less_than_the_papers_rule(path):
    by_the_model, by_an_index = TokenSeekCollator(), TokenSeekCollator(path)
    assert by_the_model.rule == by_an_index.rule == SelectionRule("sampled", 0.3, alpha=0, beta=1, explore=0.3)
    assert by_the_model.online and not by_an_index.online and not TokenSeekCollator(rule="random").online


def test_an_example_that_was_not_scored_is_refused(dataset, path):
    with pytest.raises(UserError, match="has no example 'new'"):
        TokenSeekCollator(path, rule="top")([{**dataset[0], "example_id": "new"}])


@pytest.mark.parametrize("tokens", [lambda ids: [*ids[:-1], ids[-1] + 1], lambda ids: ids[:-1], lambda ids: [*ids, 7]])
def test_an_example_with_other_tokens_than_those_scored_is_refused(dataset, path, tokens):
    ids = tokens(dataset[0]["input_ids"])
    with pytest.raises(UserError, match="other tokens.*Score it again"):
        TokenSeekCollator(path, rule="top")([{**dataset[0], "input_ids": ids, "labels": ids}])


@pytest.mark.parametrize("index", [True, False])
def test_an_example_without_its_id_is_refused(dataset, path, index):
    """Which is what remains of it under Trainer's default `remove_unused_columns=True`."""
    collator = TokenSeekCollator(path, rule="top") if index else TokenSeekCollator(None, rule="random")
    with pytest.raises(UserError, match="remove_unused_columns=False"):
        collator([{"input_ids": dataset[0]["input_ids"], "labels": dataset[0]["labels"]}])


def selections(collator, dataset):
    return [valid(row) for row in collator(list(dataset))["selected_positions"]]


def test_random_draws_change_with_the_epoch_and_the_seed_and_with_nothing_else(dataset):
    collator = TokenSeekCollator(None, 0.3, "random")
    first = selections(collator, dataset)
    assert selections(collator, dataset) == first == selections(TokenSeekCollator(None, 0.3, "random"), dataset)
    assert [valid(collator([e])["selected_positions"][0]) for e in dataset] == first  # whatever else is in the batch
    collator.set_epoch(1)
    assert selections(collator, dataset) != first
    collator.set_epoch(0)
    assert selections(collator, dataset) == first
    assert selections(TokenSeekCollator(None, 0.3, "random", seed=1), dataset) != first


def test_top_selections_do_not_change_with_the_epoch(dataset, path):
    collator = TokenSeekCollator(path, 0.3, "top")
    first = selections(collator, dataset)
    collator.set_epoch(1)
    assert selections(collator, dataset) == first


def test_a_pickled_collator_gives_the_same_batches(dataset, path):
    collator = TokenSeekCollator(path, 0.3, "top_random", explore=0.5, pad_token_id=9)
    collator.set_epoch(3)
    batch, expected = pickle.loads(pickle.dumps(collator))(list(dataset)), collator(list(dataset))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_a_new_epoch(dataset, path, persistent):
    collator = TokenSeekCollator(path, 0.3, "top_random", explore=0.5)
    loader = DataLoader(dataset, 2, collate_fn=collator, num_workers=2, persistent_workers=persistent)
    drawn = []
    for epoch in range(2):
        collator.set_epoch(epoch)
        drawn.append([valid(row) for batch in loader for row in batch["selected_positions"]])
        assert drawn[-1] == selections(collator, dataset)
    assert drawn[0] != drawn[1]


def test_columns_of_numbers_in_any_form_do(dataset, path):
    """Data sets in the formats of NumPy and torch give arrays and tensors."""
    collator = TokenSeekCollator(path, 0.3, "top")
    expected = collator(list(dataset))
    for form in ("numpy", "torch"):
        batch = collator(list(dataset.with_format(form)))
        assert all(torch.equal(batch[name], expected[name]) for name in expected), form


def test_a_selection_without_any_loss_is_told():
    collator = TokenSeekCollator(None, rule="all")
    examples = {"example_id": ["a", "b"], "input_ids": [[5, 6, 7], [5, 6]], "labels": [[-100, -100, 7], [-100, -100]]}
    assert "5 of 5 tokens, 20% of which carry a loss" in Selected.among(collator, Dataset.from_dict(examples)).report()
    examples["labels"][0] = [5, -100, -100]
    assert "WARNING: no selected token carries a loss" in Selected.among(collator, Dataset.from_dict(examples)).report()


def test_sampled_losses_are_weighted_and_counted_over_all_labels(dataset, path):
    collator = TokenSeekCollator(path, 0.4, "sampled", explore=0.5, scope="supervised")
    batch = collator([dataset[row] for row in range(4)])
    plain = collator.without_selection()([dataset[row] for row in range(4)])
    assert torch.equal(batch["labels"], plain["labels"]), "the number of all labels is what the sum is divided by"
    packed = TokenSeekCollator(path, 0.4, "sampled", explore=0.5, scope="supervised", packing=True)
    packed = packed([dataset[row] for row in range(4)])
    weights, positions = batch["selected_weights"], batch["selected_positions"]
    assert torch.equal(packed["selected_weights"][0], weights[positions >= 0])
    assert weights.shape == positions.shape and (weights[positions < 0] == 0).all() and (weights > 1).any()

    model = tiny_model("llama", dtype=torch.float64)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
    carrying = positions.clamp(min=0)
    expected = (losses.gather(1, carrying.clamp(max=losses.shape[1] - 1)) * weights).sum()
    enable_token_ditching(model)
    for count in (int(batch["labels"][:, 1:].ne(-100).sum()), None):
        loss = model(**batch, num_items_in_batch=count).loss
        assert_close(loss, expected / (count or weights.sum()), torch.float32)  # as the weights
