"""Ranks that share an example select and train together as one process does: positions, loss, every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from closeness import assert_close
from distributed.sequence_cases import Case, build, gradients, make_inputs, positions
from distributed.spawn import spawn
from numerics.dense_reference import dense_loss

import tokenseek
from tokenseek import SelectionRule, UserError
from tokenseek.ditching import Seeking
from tokenseek.parallel import enable_sequence_parallelism, measured
from tokenseek.selection.batched import draw_key

DRAWN = SelectionRule("sampled", ratio=0.4, alpha=0, beta=1, explore=0.3, scope="supervised")
MIXED = SelectionRule("top", ratio=0.4)
PACKED_CONTIGUOUS = Case(lengths=(19,), packed=(5, 8, 6), layout="contiguous")
PACKED_LORA = Case(lengths=(19,), packed=(5, 8, 6), lora=True, recompute=True)
CASES = {
    "llama": (Case(), DRAWN, "l2"),
    "llama: contiguous": (Case(layout="contiguous"), DRAWN, "l2"),
    "llama: regroup": (Case(layout="regroup"), DRAWN, "l2"),
    "llama: by attention and gradient": (Case(), MIXED, "abs"),
    "llama: by error": (Case(), DRAWN, "error"),
    "llama: random": (Case(), SelectionRule("random", ratio=0.4), "abs"),
    "llama: eager": (Case(model=dict(attn="eager")), DRAWN, "l2"),
    "mistral: window": (Case("mistral"), DRAWN, "l2"),
    "gpt2": (Case("gpt2"), DRAWN, "l2"),
    "one key/value head": (Case(model=dict(num_key_value_heads=1)), DRAWN, "l2"),
    "one example": (Case(lengths=(13,)), DRAWN, "l2"),
    "ragged lengths": (Case(lengths=(5, 13, 2)), DRAWN, "l2"),
    "LoRA": (Case(lora=True), DRAWN, "l2"),
    "recompute": (Case(recompute=True), DRAWN, "l2"),
    "number of items": (Case(num_items=17), DRAWN, "l2"),
    "exact layer": (Case(), DRAWN, "l2", 1),
    "exact layers: contiguous": (Case(layout="contiguous"), DRAWN, "l2", 2),
    "exact layers: regroup": (Case(layout="regroup"), DRAWN, "l2", 2),
    "exact layers: mistral, window": (Case("mistral"), DRAWN, "l2", 2),
    "exact layers: gpt2": (Case("gpt2"), DRAWN, "l2", 1),
    "exact layers: all": (Case(lengths=(5, 13, 2)), DRAWN, "l2", 4),
    "exact layers: LoRA, recompute": (Case(lora=True, recompute=True, num_items=17), DRAWN, "l2", 1),
    "packed": (Case(lengths=(19,), packed=(5, 8, 6)), DRAWN, "l2"),
    "packed: contiguous, by attention and gradient": (PACKED_CONTIGUOUS, MIXED, "abs"),
    "packed: regroup, by error": (Case(lengths=(19,), packed=(5, 8, 6), layout="regroup"), DRAWN, "error"),
    "packed: eager": (Case(model=dict(attn="eager"), lengths=(19,), packed=(5, 8, 6)), DRAWN, "l2"),
    "packed: mistral, window": (Case("mistral", lengths=(19,), packed=(5, 8, 6)), DRAWN, "l2"),
    "packed: random, LoRA, recompute": (PACKED_LORA, SelectionRule("random", ratio=0.4), "abs"),
    "packed: exact layers, rows of two": (Case(lengths=(14, 14), packed=(6, 8)), DRAWN, "l2", 2),
    "in tiles": (Case(tile_rows=4), DRAWN, "l2"),
    "in tiles: contiguous, by attention and gradient": (Case(layout="contiguous", tile_rows=4), MIXED, "abs"),
    "in tiles: by error, recompute": (Case(recompute=True, tile_rows=4), DRAWN, "error"),
    "in tiles: mistral, window": (Case("mistral", tile_rows=4), DRAWN, "l2"),
    "in tiles: eager": (Case(model=dict(attn="eager"), tile_rows=4), DRAWN, "l2"),
    "in tiles: exact layers": (Case(tile_rows=4), DRAWN, "l2", 2),
    "in tiles: packed": (Case(lengths=(19,), packed=(5, 8, 6), tile_rows=2), DRAWN, "l2"),
    "in tiles: packed, window": (Case("mistral", lengths=(19,), packed=(5, 8, 6), tile_rows=2), DRAWN, "l2"),
    "packed: exact layer, one example": (Case(lengths=(13,), packed=(13,)), DRAWN, "l2", 1),
}


def compare(case: Case, rule: SelectionRule, reduction: str, exact_layers: int = 0) -> str | None:
    seeking = Seeking(reduction, exact_layers=exact_layers)
    group = dist.group.WORLD
    inputs, examples = make_inputs(case), len(case.lengths) * len(case.packed or (0,))
    inputs |= {"selection": rule, "selection_keys": torch.tensor([draw_key(n, 2) for n in range(examples)])}
    model = build(case)
    alone = tokenseek.enable_token_ditching(copy.deepcopy(model), seeking=seeking)
    expected = alone(**inputs)
    expected_gradients = gradients(alone, expected.loss)
    tokenseek.enable_token_ditching(model, recompute=case.recompute, seeking=seeking, tile_rows=case.tile_rows)
    enable_sequence_parallelism(model, group, layout=case.layout)
    output = model(**inputs)
    actual = gradients(model, output.loss)
    for gradient in actual.values():
        dist.all_reduce(gradient, group=group)
        gradient /= group.size()
    try:
        assert torch.equal(output.selected_positions, expected.selected_positions), "other positions"
        assert_close(output.selected_weights.double(), expected.selected_weights.double(), torch.float32)
        assert_close(output.loss_all, expected.loss_all, case.computed_in)
        assert_close(output.loss, expected.loss, case.computed_in)
        assert_close({name: actual.get(name) for name in expected_gradients}, expected_gradients, case.computed_in)
    except AssertionError as error:
        return str(error)
    return None


def compare_all(rank: int) -> dict[str, str | None]:
    return {name: compare(*case) for name, case in CASES.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_select_and_train_as_one_process(ranks):
    for found in spawn(ranks, compare_all, timeout=200):
        assert not {name: difference for name, difference in found.items() if difference}


def calls_of_a_step(rank: int, tile_rows: int | str) -> int:
    case = Case(lengths=(30,))
    model = tokenseek.enable_token_ditching(build(case), seeking=Seeking("error"), tile_rows=tile_rows)
    enable_sequence_parallelism(model, dist.group.WORLD)
    with measured() as traffic:
        model(**make_inputs(case), selection=DRAWN, selection_keys=torch.tensor([1]))
    return traffic.forward_calls["attention"]


def test_the_first_pass_runs_in_tiles():
    layers, tiles = 4, 5  # of 15 tokens on a rank
    assert spawn(2, calls_of_a_step, "auto") == [layers * (2 + 2)] * 2
    assert spawn(2, calls_of_a_step, 3) == [layers * (1 + 2 * tiles + 2)] * 2


def weighted(rank: int) -> None:
    """Weights of positions that were selected before."""
    case = Case()
    inputs = make_inputs(case)
    chosen = positions(case, inputs)
    weights = 1 + torch.arange(chosen.numel(), dtype=torch.float64).view(chosen.shape)
    targets = torch.nn.functional.pad(inputs["labels"], (0, 2), value=-100).gather(1, chosen + 1)
    items = weights[targets.ne(-100) & chosen.ge(0)].sum()
    model = build(case)
    reference = copy.deepcopy(model)
    expected_loss = dense_loss(
        reference, **inputs, selected_positions=chosen, selected_weights=weights, num_items_in_batch=items
    )
    expected = gradients(reference, expected_loss)
    enable_sequence_parallelism(tokenseek.enable_token_ditching(model), dist.group.WORLD)
    loss = model(**inputs, selected_positions=chosen, selected_weights=weights).loss
    actual = gradients(model, loss)
    for gradient in actual.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    assert_close(loss, expected_loss, torch.float64)
    assert_close(actual, expected, torch.float64)


def test_weights_are_shared_out():
    spawn(2, weighted)


def refused(rank: int) -> None:
    case = Case()
    inputs = make_inputs(case) | {"selection": DRAWN, "selection_keys": torch.tensor([1, 2])}
    model = enable_sequence_parallelism(tokenseek.enable_token_ditching(build(case)), dist.group.WORLD)
    with pytest.raises(UserError, match="needs input_ids"):
        model(**inputs | {"input_ids": None, "inputs_embeds": torch.zeros(2, 13, 32)})
    with pytest.raises(UserError, match="position_ids of rank.* differ"):
        model(**inputs | {"position_ids": torch.arange(13).expand(2, -1) + rank})
    with pytest.raises(UserError, match="needs padding on the right"):
        model(**inputs | {"attention_mask": inputs["attention_mask"].flip(1)})
    with pytest.raises(UserError, match="selection_keys of rank.* differ"):
        model(**inputs | {"selection_keys": torch.tensor([1, 2 + rank])})


def test_what_cannot_be_shared_is_refused_on_all_ranks():
    spawn(2, refused)
