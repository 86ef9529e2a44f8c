"""Who holds which tokens and heads: arithmetic, checked without a process."""

import doctest

import pytest
import torch

from tokenseek.errors import UserError
from tokenseek.ulysses import layout
from tokenseek.ulysses.layout import cut, deal, owner_of, shard_heads
from tokenseek.ulysses.regroup import plan_move


def random_positions(seed: int, batch: int = 3, tokens: int = 23) -> torch.Tensor:
    """[B, A] ascending, padded with -1; one example without any."""
    keep = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    keep[seed % batch] = False
    keep[(seed + 1) % batch, 5] = True
    positions = torch.full((batch, int(keep.sum(1).max())), -1)
    for target, kept in zip(positions, keep, strict=True):
        target[: kept.sum()] = kept.nonzero().squeeze(1)
    return positions


LAYOUTS = {"balanced": deal, "contiguous": lambda positions, ranks: cut(positions, ranks, 23)}


def test_examples_in_docstrings():
    assert doctest.testmod(layout).failed == 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_on_one_rank_and_all_together_are_in_text_order(name, ranks, seed):
    positions = random_positions(seed)
    shards = LAYOUTS[name](positions, ranks)
    assert shards.positions_BPR.shape[:2] == (3, ranks)
    for example, together in zip(positions, shards.in_text_order, strict=True):
        assert torch.equal(together[together >= 0], example[example >= 0])


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_dealt_rows_differ_by_one_at_most_and_empty_slots_come_last(ranks):
    positions = torch.arange(100, 117)[None]  # a cluster at the end of a long text
    counts = (deal(positions, ranks).positions_BPR >= 0).sum(-1)
    assert counts.max() - counts.min() <= 1
    together = deal(positions, ranks).in_text_order[0]
    assert torch.equal(together[:17], positions[0]) and (together[17:] == -1).all()
    assert (cut(positions, ranks, 117).positions_BPR >= 0).sum(-1).max() == 17  # all of it on one rank


def test_contiguous_rows_are_on_the_rank_of_their_stretch():
    shards = cut(random_positions(0), 4, 23)
    for rank in range(4):
        held = shards.positions_BPR[:, rank]
        assert (held[held >= 0] // 6 == rank).all()
    assert owner_of(torch.tensor([0, 5, 6, 22, -1]), 4, 23).tolist() == [0, 0, 1, 3, 4]


@pytest.mark.parametrize("query_heads,key_heads", [(8, 8), (8, 2), (8, 1), (12, 4), (12, 3), (6, 2), (14, 2), (32, 8)])
def test_a_rank_gets_the_keys_of_its_query_heads(query_heads, key_heads):
    group = query_heads // key_heads
    for ranks in (r for r in range(1, query_heads + 1) if query_heads % r == 0):
        heads = shard_heads(query_heads, key_heads, ranks)
        per_rank = len(heads.key_heads) // ranks
        assert per_rank * heads.query_heads_per_key == heads.query_heads == query_heads // ranks
        for rank in range(ranks):
            keys = heads.key_heads[rank * per_rank : (rank + 1) * per_rank]
            for local in range(heads.query_heads):
                head = rank * heads.query_heads + local
                assert keys[local // heads.query_heads_per_key] == head // group
        if key_heads % ranks == 0:
            assert heads.is_split(key_heads)
        elif ranks % key_heads == 0:
            assert per_rank == 1


def test_heads_that_ranks_cannot_share():
    with pytest.raises(UserError, match="4 sequence-parallel ranks cannot share 6 query heads evenly.*: 1, 2, 3, 6"):
        shard_heads(6, 2, 4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_moves_between_layouts_agree_and_bring_every_row_to_its_slot(ranks, seed):
    positions = random_positions(seed)
    before, after = cut(positions, ranks, 23), deal(positions, ranks)
    moves = [plan_move(before, after, rank) for rank in range(ranks)]
    assert [[m.send[to] for m in moves] for to in range(ranks)] == [m.receive for m in moves]
    # The all-to-all by hand: what each rank sends to each other, in its order.
    parcels = [before.positions_BPR[:, rank].flatten()[move.take].split(move.send) for rank, move in enumerate(moves)]
    for rank, move in enumerate(moves):
        slots = torch.full((3 * move.slots,), -1)
        slots[move.put] = torch.cat([parcel[rank] for parcel in parcels])
        assert torch.equal(slots.view(3, -1), after.positions_BPR[:, rank])
