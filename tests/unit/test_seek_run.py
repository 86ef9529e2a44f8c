"""Scoring a data set: the index does not depend on who scored which shard, nor on how often a run was cut short."""

import os
import shutil
import time

import datasets
import numpy as np
import pytest
import torch
from closeness import assert_close
from tiny_models import VOCAB, tiny_model

from tokenseek.errors import UserError
from tokenseek.index import IndexHeader, ShardStore, TokenIndex, merge_shards, tokens_crc
from tokenseek.seeking import (
    SeekingProgress,
    TokenScorer,
    assigned_shards,
    plan_batches,
    seek,
    seek_abandoned,
    wait_for_shards,
)
from tokenseek.seeking.run import _score_batches as score_batches


class CountingScorer:
    """A scorer that counts the examples it was given, and stops as a killed process does after `limit` batches."""

    def __init__(self, scorer, limit=None):
        self.scorer, self.limit, self.examples = scorer, limit, 0
        self.device, self.dtype = scorer.device, scorer.dtype

    def prepare(self, *batch):
        return self.scorer.prepare(*batch)

    def run(self, batch):
        if self.limit == 0:
            raise KeyboardInterrupt
        self.limit = self.limit and self.limit - 1
        self.examples += len(batch.input_ids)
        return self.scorer.run(batch)


@pytest.fixture(scope="module")
def scorer():
    return TokenScorer(tiny_model("llama"))


@pytest.fixture(scope="module")
def dataset():
    generator = np.random.default_rng(0)
    rows = []
    for row, length in enumerate(generator.integers(1, 40, 30)):
        ids = generator.integers(3, VOCAB, length)
        labels = np.where(np.arange(length) < 5, -100, ids)
        rows.append({"example_id": f"{row:08d}-x", "input_ids": ids.tolist(), "labels": labels.tolist()})
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def plan(dataset):
    return plan_batches([len(ids) for ids in dataset["input_ids"]], tokens_per_batch=80, tokens_per_shard=100)


def make_store(folder, plan):
    header = IndexHeader(fingerprints={"model": "m"}, num_examples=len(plan.lengths), num_tokens=plan.num_tokens)
    return ShardStore(folder, header, len(plan.shards))


def merged_bytes(folder):
    merge_shards(folder, folder / "index.arrow")
    return (folder / "index.arrow").read_bytes()


@pytest.fixture(scope="module")
def expected(scorer, dataset, plan, tmp_path_factory):
    """The index that one process makes."""
    folder = tmp_path_factory.mktemp("one")
    assert seek(scorer, dataset, make_store(folder, plan), plan, run_id="one") == len(plan.shards) > 3
    return merged_bytes(folder)


def test_the_index_holds_the_scores_of_every_example(scorer, dataset, plan, expected, tmp_path):
    (tmp_path / "index.arrow").write_bytes(expected)
    index = TokenIndex.open(tmp_path / "index.arrow")
    assert len(index) == len(dataset)
    for row, example in enumerate(dataset):
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        context, gradient = index.scores(row)
        alone = scorer.score(ids, torch.ones_like(ids), labels)
        assert_close(context, alone.context[0])
        assert_close(gradient, alone.gradient[0])
        assert index.example_id(row) == example["example_id"]
        assert index.tokens_crc(row) == tokens_crc(example["input_ids"])


def test_the_next_batch_is_prepared_before_the_scores_of_one_are_read(scorer, dataset, plan, monkeypatch):
    """On a GPU reading them waits: once a batch, and while there is nothing left to prepare."""
    done, cpu = [], torch.Tensor.cpu

    class Noting(CountingScorer):
        def prepare(self, *batch):
            done.append("prepare")
            return super().prepare(*batch)

        def run(self, batch):
            done.append("run")
            return super().run(batch)

    batches = [rows for shard in plan.shards for rows in shard][:3]
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (done.append("read"), cpu(tensor))[1])
    for _, scored in score_batches(Noting(scorer), dataset, batches):
        list(scored)
    assert done == ["prepare", "run", "prepare", "read", "run", "prepare", "read", "run", "read"]


def test_a_process_that_comes_after_the_merge_finds_nothing_to_do(dataset, plan, tmp_path):
    store = make_store(tmp_path / "shards", plan)  # before the others finished, merged and removed all
    shutil.rmtree(tmp_path / "shards")
    assert seek(None, dataset, store, plan, run_id="run") == 0
    assert store.finished() == set(range(len(plan.shards))) and not list(tmp_path.iterdir())


def test_three_workers_in_turns_make_the_same_index(scorer, dataset, plan, expected, tmp_path):
    """Worker 0 takes a shard and, while at it, the others take theirs; then each goes on where it finds work."""
    store = make_store(tmp_path, plan)
    claim, claimed = store.claim, []

    def claim_and_let_others_work(shard, run_id):
        mine = claim(shard, run_id)
        if mine and len(claimed) < 2:
            claimed.append(shard)
            other = make_store(tmp_path, plan)
            limit = [shard + 1, shard + 2] if len(claimed) == 1 else reversed(range(len(plan.shards)))
            seek(scorer, dataset, other, plan, run_id="run", shards=limit)
        return mine

    store.claim = claim_and_let_others_work
    scored = seek(scorer, dataset, store, plan, run_id="run")
    assert 0 < scored < len(plan.shards)
    assert merged_bytes(tmp_path) == expected


def test_jobs_that_know_nothing_of_each_other_make_the_same_index(scorer, dataset, plan, expected, tmp_path):
    for part in (2, 0, 1):
        shards = assigned_shards(plan, part, 3)
        store = make_store(tmp_path, plan)
        assert seek(scorer, dataset, store, plan, run_id=f"job-{part}", shards=shards) == len(shards)
        wait_for_shards(store, shards)
    assert merged_bytes(tmp_path) == expected


@pytest.mark.parametrize("batches", [0, 1, 5, 8])
def test_a_killed_run_goes_on_without_scoring_finished_shards_again(scorer, dataset, plan, expected, tmp_path, batches):
    with pytest.raises(KeyboardInterrupt):
        seek(CountingScorer(scorer, limit=batches), dataset, make_store(tmp_path, plan), plan, run_id="first")
    store = make_store(tmp_path, plan)
    finished = store.finished()
    left = sum(len(rows) for shard in set(range(len(plan.shards))) - finished for rows in plan.shards[shard])
    again = CountingScorer(scorer)
    assert seek(again, dataset, store, plan, run_id="second") == len(plan.shards) - len(finished)
    assert again.examples == left
    assert merged_bytes(tmp_path) == expected
    assert seek(again, dataset, store, plan, run_id="third") == 0
    assert again.examples == left


def test_scores_that_are_not_finite_name_the_example(dataset, plan, tmp_path):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[dataset[0]["input_ids"][0]] = float("nan")
    with pytest.raises(UserError, match=r"Example '\d{8}-x' \(row \d+\).*not finite.*float32, whose range suffices"):
        seek(TokenScorer(broken), dataset, make_store(tmp_path / "nan", plan), plan, run_id="run")
    overflowing = tiny_model("llama")
    with torch.no_grad():
        overflowing.lm_head.weight.mul_(1e5)
        overflowing.model.norm.weight.mul_(1e3)
    with pytest.raises(UserError, match="float16 overflowed: load the model in bfloat16 or float32"):
        seek(TokenScorer(overflowing.half()), dataset, make_store(tmp_path / "inf", plan), plan, run_id="run")


def test_a_plan_of_other_data_is_refused(scorer, dataset, plan, tmp_path):
    with pytest.raises(UserError, match="30 examples.*the data set 29"):
        seek(scorer, dataset.select(range(29)), make_store(tmp_path, plan), plan, run_id="run")


def test_progress_counts_the_work_of_all_processes(scorer, dataset, plan, tmp_path, capfd):
    store = make_store(tmp_path, plan)
    everything = range(len(plan.shards))
    seek(scorer, dataset, make_store(tmp_path, plan), plan, run_id="run", shards=[0])
    with SeekingProgress(store, plan, everything) as progress:
        seek(scorer, dataset, make_store(tmp_path, plan), plan, run_id="run", shards=[2])  # another process
        seek(scorer, dataset, store, plan, run_id="run", progress=progress)
        wait_for_shards(store, progress=progress)
    out = capfd.readouterr().err
    assert "seeking tokens: 100%" in out and "tok/s" in out
    with SeekingProgress(store, plan, everything, disable=True) as progress:
        wait_for_shards(store, progress=progress)
    assert capfd.readouterr().err == ""


def test_waiting_ends_when_nobody_works_any_more(scorer, dataset, plan, tmp_path):
    store = make_store(tmp_path, plan)
    seek(scorer, dataset, store, plan, run_id="run", shards=[0, 1])
    wait_for_shards(store, [0, 1])
    with pytest.raises(UserError, match="missing: 2, 3.*run scoring again"):
        wait_for_shards(store, stall_seconds=0.05, poll_seconds=0.01)


def test_a_shard_whose_process_died_is_taken_over_by_one_other(scorer, dataset, plan, expected, tmp_path, caplog):
    dead, one, two = (make_store(tmp_path, plan) for _ in range(3))
    assert dead.claim(1, "run")
    for store in (one, two):
        seek(scorer, dataset, store, plan, run_id="run")
        assert store.take_over(1, "run", lease_seconds=0.2) is None  # the time is the observer's own
    assert one.finished() == set(range(len(plan.shards))) - {1}
    dead.renew(1)
    time.sleep(0.3)
    assert one.take_over(1, "run", lease_seconds=0.2) is None  # it gave a sign since
    counting = CountingScorer(scorer)
    options = dict(run_id="run", lease_seconds=0.2, poll_seconds=0.01)
    assert seek_abandoned(counting, dataset, one, plan, **options) == 1
    assert counting.examples == sum(map(len, plan.shards[1]))
    assert f"Shard 1 is scored again: process {os.getpid()} on" in caplog.text
    assert seek_abandoned(counting, dataset, two, plan, **options) == 0
    assert merged_bytes(tmp_path) == expected


def test_one_of_many_takes_over_and_then_it_may_be_taken_over_itself(plan, tmp_path):
    stores = [make_store(tmp_path, plan) for _ in range(8)]
    assert [store.claim(0, "run") for store in stores].count(True) == 1
    for _ in range(2):
        assert not any(store.take_over(0, "run", 0.05) for store in stores)
        time.sleep(0.1)
        assert [store.take_over(0, "run", 0.05) is not None for store in stores].count(True) == 1


def test_a_process_that_was_believed_dead_does_no_harm(scorer, dataset, plan, expected, tmp_path):
    """Both write the shard at once, and in the end one whole file is there."""
    slow, fast = make_store(tmp_path, plan), make_store(tmp_path, plan)
    seek(scorer, dataset, slow, plan, run_id="run", shards=range(1, len(plan.shards)))
    assert slow.claim(0, "run")
    examples = [example for _, scored in score_batches(scorer, dataset, plan.shards[0]) for example in scored]

    def interrupted():
        yield examples[0]
        assert seek_abandoned(scorer, dataset, fast, plan, run_id="run", lease_seconds=0.01, poll_seconds=0.02) == 1
        yield from examples[1:]

    slow.write(0, interrupted())
    assert merged_bytes(tmp_path) == expected


def test_a_process_that_wakes_up_after_the_merge_finds_all_done(scorer, dataset, plan, tmp_path):
    asleep, awake = make_store(tmp_path / "shards", plan), make_store(tmp_path / "shards", plan)
    assert asleep.claim(0, "run")
    seek(scorer, dataset, awake, plan, run_id="run")
    assert seek_abandoned(scorer, dataset, awake, plan, run_id="run", lease_seconds=0.01, poll_seconds=0.02) == 1
    shutil.rmtree(tmp_path / "shards")
    asleep.renew(0)
    assert asleep.is_finished(0)
    assert seek(scorer, dataset, asleep, plan, run_id="run") == 0
    assert seek_abandoned(scorer, dataset, asleep, plan, run_id="run") == 0
    assert not (tmp_path / "shards").exists()


def test_a_slow_process_gives_others_as_much_time_as_it_takes_itself(plan, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slow, other = make_store(tmp_path, plan), make_store(tmp_path, plan)
    assert slow.claim(0, "run") and other.claim(1, "run")
    now[0] = 20.0
    slow.renew(0)  # 20 seconds for a batch
    assert slow.take_over(1, "run") is None
    now[0] += 190
    assert slow.take_over(1, "run") is None
    now[0] += 20
    assert slow.take_over(1, "run")
