"""Whole data sets packed into rows of max_length tokens, and trained as such: each example once, alike on all ranks."""

import re

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_preset import tiny_preset
from tiny_run import LENGTHS, tiny_arguments, tiny_dataset, write_index

from tokenseek import SelectionRule, TokenSeekCollator, TokenSeekTrainer, UserError
from tokenseek.config import load_config
from tokenseek.data.packing import PackedDataset, first_fit_decreasing, unpacked
from tokenseek.training.groups import GroupTrainer
from tokenseek.training.sampling import LengthGroupedSampler, WithBlanks


def slowly(lengths, capacity):
    """First-fit decreasing as it is defined."""
    bins, free = [], []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        number = next((b for b, room in enumerate(free) if room >= lengths[item]), len(bins))
        if number == len(bins):
            bins.append([])
            free.append(capacity)
        bins[number].append(item)
        free[number] -= lengths[item]
    return sorted(sorted(items) for items in bins)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 300])
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_those_of_the_definition(count, seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(5, 200))
    lengths = random.integers(1, capacity + 1, count)
    bins = [items.tolist() for items in first_fit_decreasing(lengths, capacity)]
    assert bins == slowly(lengths.tolist(), capacity) == [i.tolist() for i in first_fit_decreasing(lengths, capacity)]
    assert sorted(item for items in bins for item in items) == list(range(count))
    assert all(sum(lengths[items]) <= capacity for items in bins)


def test_many_examples_are_packed_in_a_moment():
    lengths = np.random.default_rng(0).integers(10, 500, 50_000)
    rows = first_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.99


def test_an_example_longer_than_a_row_is_named():
    with pytest.raises(UserError, match="example 1 has 9 tokens, and a row holds 8"):
        first_fit_decreasing([3, 9], 8)


@pytest.fixture(scope="module")
def dataset():
    return tiny_dataset()


@pytest.fixture(scope="module")
def index(dataset, tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("index") / "index.arrow", dataset)


@pytest.mark.parametrize("online", [False, True])
def test_a_row_is_collated_as_its_examples_are(dataset, index, online):
    rows = PackedDataset(dataset, 40)
    assert len(rows) < len(dataset) and f"{len(dataset)} examples in {len(rows)} rows of 40 tokens" in str(rows)
    assert rows.filled == sum(LENGTHS) / (40 * len(rows))
    options = dict(rule=SelectionRule("top_random", 0.3, explore=0.5), packing=True)
    collator = TokenSeekCollator(None, online=True, **options) if online else TokenSeekCollator(str(index), **options)
    batch, examples = [rows[0], rows[1]], unpacked([rows[0], rows[1]])
    assert (
        len(examples) > 2 and [e["example_id"] for e in examples] != [e["example_id"] for e in dataset][: len(examples)]
    )
    packed, laid_out = collator(batch), collator(examples)
    assert packed.keys() == laid_out.keys()
    for name, values in packed.items():
        assert torch.equal(values, laid_out[name]) if isinstance(values, torch.Tensor) else values == laid_out[name]


def test_blanks_of_packed_rows_carry_no_loss(dataset, index):
    rows = WithBlanks(PackedDataset(dataset, 40), 1)
    batch = TokenSeekCollator(str(index), 0.3, "top", packing=True)([rows[len(rows) - 1]])
    assert (batch["labels"] == -100).all() and batch["input_ids"].shape[1] == len(rows[0]["examples"][0]["input_ids"])


@pytest.mark.parametrize("online", [False, True])
def test_an_epoch_of_rows_trains_every_example_once(dataset, index, tmp_path, online):
    rows, seen = PackedDataset(dataset, 40), []

    class Recording(TokenSeekTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["example_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    rule = SelectionRule("random" if online else "top", 0.3)
    collator = TokenSeekCollator(None if online else str(index), rule=rule, packing=True, online=online)
    options = dict(train_sampling_strategy="random", per_device_train_batch_size=1, gradient_accumulation_steps=1)
    arguments = tiny_arguments(tmp_path, learning_rate=0.01, **options)
    trainer = Recording(tiny_model("llama"), arguments, data_collator=collator, train_dataset=rows)
    result = trainer.train()
    assert result.global_step == len(rows) and np.isfinite(result.training_loss)
    assert sorted(seen) == sorted(dataset["example_id"])


def test_the_loss_of_a_row_is_that_of_its_examples_padded(dataset, index, tmp_path):
    """Rows differ from batches in what lies side by side only."""
    from tokenseek import enable_token_ditching

    rows = PackedDataset(dataset, 40)
    model = tiny_model("llama").double().eval()
    enable_token_ditching(model)
    losses = []
    for packing, batch in ((True, [rows[0]]), (False, rows[0]["examples"])):
        inputs = TokenSeekCollator(str(index), 0.3, "top", packing=packing)(batch)
        losses.append(model(**inputs, num_items_in_batch=1).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_settings():
    settings = ["data.sources.0.path=train.jsonl", "training.packing=bins"]
    assert load_config("gsm8k", settings).training.packing == "bins"
    with pytest.raises(UserError, match="packing: bins needs ditching: true.*selection.rule: all"):
        load_config("gsm8k", [*settings, "training.ditching=false"])
    with pytest.raises(UserError, match="training.packing"):
        load_config("gsm8k", ["training.packing=yes"])


@pytest.mark.parametrize("blanks", [0, 3])
def test_examples_of_similar_lengths_side_by_side(blanks):
    lengths = np.random.default_rng(0).integers(1, 1000, 401).tolist()
    sampler = LengthGroupedSampler(lengths, blanks, seed=3, group=8)
    order = list(sampler)
    assert order == list(LengthGroupedSampler(lengths, blanks, seed=3, group=8)) and len(order) == 401 + blanks
    assert sorted(order) == list(range(401 + blanks)) and order[401:] == list(range(401, 401 + blanks))
    spread = [np.ptp([lengths[i] for i in order[start : start + 8]]) for start in range(8, 392, 8)]
    assert np.median(spread) < 250 < np.ptp(lengths[:8])
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_group_by_length_takes_the_lengths_of_rows_too(dataset, tmp_path):
    arguments = tiny_arguments(tmp_path, train_sampling_strategy="group_by_length")
    rows = PackedDataset(dataset, 40)
    trainer = GroupTrainer(tiny_model("llama"), arguments, train_dataset=rows)
    trainer.get_train_dataloader()
    assert trainer.new_epoch.sampler.lengths == [sum(LENGTHS[example] for example in items) for items in rows.bins]


@pytest.mark.parametrize("mode", ["index", "online"])
def test_a_run_with_packed_rows(tmp_path, mode, capsys):
    from tokenseek.runs.train import train

    settings = ["training.packing=bins", "training.max_steps=-1", "training.gradient_accumulation_steps=1"]
    config = tiny_preset(tmp_path, *settings, f"scoring.mode={mode}", "training.per_device_train_batch_size=1")
    summary = train(config)
    out = capsys.readouterr().out
    rows = int(re.search(r"Packed: 12 examples in (\d+) rows of 512 tokens", out)[1])
    assert summary.steps == rows < 12 and np.isfinite(summary.train_loss)
