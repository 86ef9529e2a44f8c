"""Scores of a batch that ranks share equal those of one process."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from closeness import assert_close
from distributed.sequence_cases import Case, build, make_inputs
from distributed.spawn import spawn
from distributed.test_sequence_parallel import EAGER, HEADS, LONG_ROPE
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import LiveStorages
from tokenseek.errors import UserError
from tokenseek.parallel import measured
from tokenseek.seeking import TokenScorer

CASES = {
    "llama": (Case(), {}),
    "mistral: window": (Case("mistral"), {}),
    "gpt2": (Case("gpt2"), {}),
    "opt": (Case("opt"), {}),
    "gpt_oss: sinks, eager": (Case("gpt_oss", EAGER), {}),
    "phi3: rotary embeddings that depend on the length": (Case("phi3", LONG_ROPE), {}),
    "one key/value head": (Case(model=HEADS["4/1"]), {}),
    "ragged lengths": (Case(lengths=(5, 13, 1)), {}),
    "the third layer from the end": (Case(), dict(gradient_layer=3)),
    "norm of the gradient, all tokens": (Case(), dict(reduction="l2", loss_scope="sequence")),
    "one supervised token": (Case(lengths=(3,)), {}),
    "nothing supervised": (Case(lengths=(2,)), {}),
    "LoRA": (Case(lora=True), {}),
    "in tiles": (Case(), dict(tile_rows=4)),
    "in tiles of one row": (Case(lengths=(13,)), dict(tile_rows=1)),
    "in tiles: window": (Case("mistral"), dict(tile_rows=4)),
    "in tiles: gpt2": (Case("gpt2"), dict(tile_rows=4)),
    "in tiles: sinks, eager": (Case("gpt_oss", EAGER), dict(tile_rows=4)),
    "in tiles: one key/value head": (Case(model=HEADS["4/1"]), dict(tile_rows=4)),
    "in tiles: the third layer from the end": (Case(), dict(gradient_layer=3, tile_rows=4)),
}


def score_all(rank: int) -> dict[str, str | None]:
    return {name: compare(*case) for name, case in CASES.items()}


def compare(case: Case, options: dict) -> str | None:
    inputs = make_inputs(case)
    model = build(case)
    expected = TokenScorer(model, **options).score(**inputs)
    actual = TokenScorer(model, group=dist.group.WORLD, **options).score(**inputs)
    try:
        for mine, theirs in zip(actual, expected, strict=True):
            assert_close(mine, theirs)
    except AssertionError as error:
        return str(error)
    return None if actual.context.any() else "no scores"


@cache
def results(ranks: int) -> list:
    return spawn(ranks, score_all, check=False)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process(ranks, name):
    for rank, outcome in enumerate(results(ranks)):
        assert isinstance(outcome, dict), f"rank {rank}: {outcome or 'killed, or ended without a word'}"
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"


def calls_and_peak(rank: int, tile_rows: int) -> tuple[int, int]:
    """Of scoring, most of it in feed-forward layers of no gradient."""
    sizes = dict(hidden_size=64, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    # The last layer, which is scored through, is no larger than a tile of the others.
    mlp = model.model.layers[-1].mlp
    mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
    mlp.down_proj = torch.nn.Linear(64, 64, bias=False)
    ids = torch.arange(1, 2049)[None] % 64
    scorer = TokenScorer(model, group=dist.group.WORLD, tile_rows=tile_rows)
    with measured() as traffic, LiveStorages().ignore(model.parameters()) as live:
        scorer.score(ids, torch.ones_like(ids), ids)
    return traffic.forward_calls["attention"], live.peak


def test_a_layer_holds_one_tile():
    at_once, in_tiles = (spawn(2, calls_and_peak, rows) for rows in (10**9, 128))
    for one, other in zip(at_once, in_tiles, strict=True):
        assert one[0] == 4 * 2
        assert other[0] == 3 * (1 + 2 * 8) + 2, "keys and values once, then queries and outputs of each tile"
        of_all_rows = 3 * 1024 * 1024 * 4  # gate, up and their product, of the rows of a rank
        assert one[1] > of_all_rows
        assert other[1] < one[1] - 0.5 * of_all_rows


def mismatch(rank: int) -> str:
    inputs = make_inputs(Case(), seed=rank)
    with pytest.raises(UserError) as error:
        TokenScorer(build(Case(), torch.float32), group=dist.group.WORLD).score(**inputs)
    return str(error.value)


def test_different_batches_are_refused_on_all_ranks():
    for message in spawn(2, mismatch):
        assert "input_ids and labels of rank(s) 1" in message
