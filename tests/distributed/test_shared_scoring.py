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

from tokenseek.errors import UserError
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


def mismatch(rank: int) -> str:
    inputs = make_inputs(Case(), seed=rank)
    with pytest.raises(UserError) as error:
        TokenScorer(build(Case(), torch.float32), group=dist.group.WORLD).score(**inputs)
    return str(error.value)


def test_different_batches_are_refused_on_all_ranks():
    for message in spawn(2, mismatch):
        assert "input_ids and labels of rank(s) 1" in message
