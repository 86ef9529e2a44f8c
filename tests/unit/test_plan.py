"""The scoring plan: who is scored with whom, and in which shard."""

import numpy as np
import pytest

from tokenseek.errors import UserError
from tokenseek.seeking import assigned_shards, plan_batches


def lengths_like_a_data_set(count=2000, seed=0):
    return np.random.default_rng(seed).lognormal(5, 0.8, count).astype(int).clip(1, 1024)


@pytest.mark.parametrize(("batch", "shard"), [(1, 1), (7, 100), (4096, 50_000), (10**9, 10**9), (4096, 1)])
def test_every_example_is_in_exactly_one_batch(batch, shard):
    lengths = lengths_like_a_data_set(300)
    plan = plan_batches(lengths, tokens_per_batch=batch, tokens_per_shard=shard)
    rows = np.concatenate([rows for shard in plan.shards for rows in shard])
    assert sorted(rows.tolist()) == list(range(300))
    assert plan.num_tokens == lengths.sum()
    assert sum(plan.shard_tokens(shard) for shard in range(len(plan.shards))) == lengths.sum()


def test_batches_keep_to_the_budget_with_padding_counted():
    lengths = lengths_like_a_data_set()
    plan = plan_batches(lengths, tokens_per_batch=800, tokens_per_shard=20_000)
    alone = 0
    for shard in plan.shards:
        for rows in shard:
            assert lengths[rows[0]] == lengths[rows].max()
            if len(rows) * lengths[rows].max() > 800:
                assert len(rows) == 1
                alone += 1
    assert alone == (lengths > 800).sum() > 0


def test_shards_are_consecutive_rows_of_about_the_size_asked_for():
    lengths = lengths_like_a_data_set()
    plan = plan_batches(lengths, tokens_per_batch=4096, tokens_per_shard=20_000)
    rows = [sorted(np.concatenate(shard).tolist()) for shard in plan.shards]
    assert sum(rows, []) == list(range(len(lengths)))
    sizes = [plan.shard_tokens(shard) for shard in range(len(plan.shards) - 1)]
    assert all(abs(size - 20_000) <= lengths.max() for size in sizes)


def test_no_shard_is_empty_where_one_example_spans_several():
    plan = plan_batches([5, 100, 1, 5], tokens_per_batch=10, tokens_per_shard=10)
    assert [[rows.tolist() for rows in shard] for shard in plan.shards] == [[[1], [0]], [[3, 2]]]


def test_padding_is_small():
    plan = plan_batches(lengths_like_a_data_set(5000), tokens_per_batch=8192, tokens_per_shard=262_144)
    assert plan.num_padded_tokens < 1.1 * plan.num_tokens


def test_the_plan_is_a_function_of_its_arguments():
    lengths = lengths_like_a_data_set()
    plans = [plan_batches(kind(lengths), tokens_per_batch=4096, tokens_per_shard=20_000) for kind in (list, np.array)]
    first, second = ([[rows.tolist() for rows in shard] for shard in plan.shards] for plan in plans)
    assert first == second


def test_parts_of_several_jobs_cover_all_shards_once():
    plan = plan_batches(lengths_like_a_data_set(), tokens_per_batch=4096, tokens_per_shard=20_000)
    parts = [assigned_shards(plan, part, 3) for part in range(3)]
    assert sorted(shard for part in parts for shard in part) == list(range(len(plan.shards)))
    with pytest.raises(UserError, match="part 3 of 3"):
        assigned_shards(plan, 3, 3)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "empty"),
        ([4, 0, 3], {}, "Row 1 has no tokens"),
        ([4], {"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ([4], {"tokens_per_shard": 0}, "tokens_per_shard is 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(lengths, options, message):
    with pytest.raises(UserError, match=message):
        plan_batches(lengths, **{"tokens_per_batch": 10, "tokens_per_shard": 10, **options})
