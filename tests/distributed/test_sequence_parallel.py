"""Sequence parallelism: loss and every gradient against Algorithm 1 computed densely on one process, in float64.

All cases of a group size run in one set of processes, whose start is what takes time.
"""

from __future__ import annotations

import copy
import os
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from closeness import assert_close
from distributed.sequence_cases import Case, build, compare, gradients, make_inputs, positions
from distributed.spawn import spawn
from numerics.dense_reference import dense_loss
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import tokenseek
from benchmarks.models import batch_of, tiny
from tokenseek.decoder.find import find_decoder
from tokenseek.ditching import ditching_of
from tokenseek.errors import UserError
from tokenseek.parallel import disable_sequence_parallelism, enable_sequence_parallelism, measured

EAGER = dict(attn="eager")
LONG_ROPE = dict(
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=1e4,
        short_factor=[1.0] * 4,
        long_factor=[4.0] * 4,
        original_max_position_embeddings=12,  # the 13th token, which one rank alone holds, switches to the long one
    ),
    original_max_position_embeddings=12,
)
HEADS = {
    f"{query}/{key}": dict(num_attention_heads=query, num_key_value_heads=key, hidden_size=8 * query, head_dim=8)
    for query, key in [(4, 1), (4, 4), (3, 3), (6, 6), (6, 3), (6, 2), (6, 1)]
}
ONE = dict(lengths=(13,), selected=((1, 4, 5, 11),))
PACKED = dict(lengths=(12,), packed=(5, 7), selected=((1, 3, 6, 10),))

TWO_RANKS = {
    "llama": Case(),
    "qwen3": Case("qwen3"),
    "mistral: window": Case("mistral"),
    "gpt2": Case("gpt2"),
    "opt": Case("opt"),
    "llama: eager": Case(model=EAGER),
    "gemma2: soft-caps, eager": Case("gemma2", EAGER),
    "gpt_oss: sinks, eager": Case("gpt_oss", EAGER),
    "phi3: rotary embeddings that depend on the length": Case("phi3", LONG_ROPE, **ONE),
    "one key/value head": Case(model=HEADS["4/1"]),
    "as many key/value heads as query heads": Case(model=HEADS["4/4"]),
    "three heads on one rank each": Case(model=HEADS["6/2"]),
    "one example": Case(**ONE),
    "equal lengths": Case(lengths=(8, 8), selected=((1, 5), (2, 6))),
    "ragged lengths": Case(lengths=(5, 13, 1), selected=((0, 3), (1, 2, 3, 4, 5, 6, 7), (0,))),
    "spans of selected tokens that see few keys": Case(lengths=(101,), selected=(tuple(range(0, 100, 2)),)),
    "selected tokens in a cluster": Case(lengths=(13,), selected=((8, 9, 10, 11, 12),)),
    "nothing selected on a rank": Case(lengths=(13,), selected=((4,),)),
    "nothing selected in an example": Case(selected=((2, 6), ())),
    "nothing selected at all": Case(selected=((), ())),
    "all tokens but one": Case(lengths=(9,), selected=((0, 1, 2, 3, 5, 6, 7, 8),)),
    "all tokens": Case(selected=None),
    "all tokens of one example": Case(lengths=(13,), selected=None),
    "all tokens: gpt2": Case("gpt2", lengths=(13,), selected=None),
    "packed": Case(**PACKED),
    "packed: window": Case("mistral", **PACKED),
    "packed: all tokens": Case(**PACKED | dict(selected=None)),
    "padded on the left": Case(left=True, selected=((1, 4, 5, 11), (6, 9, 12))),
    "LoRA": Case(lora=True),
    "recompute": Case(recompute=True),
    "recompute: grouped heads, window": Case("mistral", recompute=True),
    "LoRA: all tokens, recompute": Case(lora=True, selected=None, recompute=True),
    "number of items": Case(num_items=17),
}
THREE_RANKS = {f"{name} heads": Case(model=values) for name, values in HEADS.items() if not name.startswith("4")} | {
    "one example": Case(model=HEADS["6/3"], **ONE),
    "window": Case("mistral", HEADS["6/2"]),
    "all tokens": Case(model=HEADS["6/2"], selected=None),
    "fewer tokens than ranks": Case(model=HEADS["3/3"], lengths=(2, 1), selected=((0,), ())),
}
FOUR_RANKS = {
    "more ranks than key/value heads": Case(),
    "one key/value head": Case(model=HEADS["4/1"]),
    "one head on each rank": Case(model=HEADS["4/4"]),
    "gpt2": Case("gpt2"),
    "opt": Case("opt"),
    "window": Case("mistral"),
    "sinks": Case("gpt_oss", EAGER),
    "nothing selected on three ranks": Case(lengths=(13,), selected=((4,),)),
    "fewer tokens than ranks": Case(lengths=(3, 1), selected=((0, 2), (0,))),
    "all tokens": Case(selected=None),
    "packed": Case(**PACKED),
    "LoRA, recompute": Case(lora=True, recompute=True),
}
LAYOUTS = {
    f"{layout}, {name}": Case(**vars(case) | dict(layout=layout))
    for layout in ("regroup", "contiguous")
    for name, case in (TWO_RANKS | FOUR_RANKS).items()
    if ":" not in name or name.startswith(("all", "packed", "gpt2", "opt", "mistral"))
}
LAYOUTS["from outside"] = Case(layout="blocks")
GROUPS = {
    "2": (2, TWO_RANKS),
    "3": (3, THREE_RANKS),
    "4": (4, FOUR_RANKS),
    "2, other layouts": (2, LAYOUTS),
    "4, other layouts": (4, {name: case for name, case in LAYOUTS.items() if name.partition(", ")[2] in FOUR_RANKS}),
}


def compare_all(rank: int, cases: dict[str, Case]) -> dict[str, str | None]:
    return {name: compare(case, dist.group.WORLD) for name, case in cases.items()}


@cache
def results(group: str) -> list[dict[str, str | None] | str | None]:
    return spawn(GROUPS[group][0], compare_all, GROUPS[group][1], check=False)


@pytest.mark.parametrize("group,name", [(group, name) for group, (_, cases) in GROUPS.items() for name in cases])
def test_loss_and_gradients_are_those_of_one_process(group, name):
    for rank, outcome in enumerate(results(group)):
        assert isinstance(outcome, dict), f"rank {rank}: {outcome or 'killed, or ended without a word'}"
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"


# Data parallelism beside sequence parallelism


def train_in_two_dimensions(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    cases = [Case(), Case(lengths=(6, 11), selected=((1, 2), (3, 9, 10)))]
    batches = [make_inputs(case, seed) for seed, case in enumerate(cases)]
    items = 5  # any number: what matters is that both data-parallel ranks divide by the same

    model = build(cases[0])
    reference = copy.deepcopy(model)
    expected_loss = sum(
        dense_loss(reference, **batch, selected_positions=positions(case, batch), num_items_in_batch=items)
        for case, batch in zip(cases, batches, strict=True)
    )
    expected = gradients(reference, expected_loss)

    mine = mesh["dp"].get_local_rank()
    enable_sequence_parallelism(model, mesh["sp"].get_group())
    model = torch.nn.parallel.DistributedDataParallel(model)
    loss = model(
        **batches[mine], selected_positions=positions(cases[mine], batches[mine]), num_items_in_batch=items
    ).loss
    # DDP averages over all four; over the data-parallel ones it is to be a sum, as in Transformers' Trainer.
    actual = gradients(model, 2 * loss)
    assert_close({name: actual[f"module.{name}"] for name in expected}, expected)


def test_beside_data_parallelism():
    spawn(4, train_in_two_dimensions)


# The loss alone


def evaluate(rank: int) -> list[float]:
    inputs = make_inputs(Case())
    model = tiny_model("llama", dtype=torch.float64)
    with torch.no_grad():
        losses = [model(**inputs).loss.item(), 0.0]
        enable_sequence_parallelism(model, dist.group.WORLD, engine="sums")
        losses[1] = model(**inputs).loss.item()
        logits = model(input_ids=inputs["input_ids"]).logits  # without labels, every rank does all of it
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert not model(**inputs, selected_positions=torch.empty(2, 0, dtype=torch.long)).loss.item()
    disable_sequence_parallelism(model)
    assert ditching_of(model).sequence is None
    return losses


def test_evaluation():
    for alone, together in spawn(2, evaluate):
        assert_close(together, alone, torch.float32)  # in which Transformers computes its own loss


# What travels


def bytes_per_layer(rank: int, layout: str, ratio: float, tokens: int) -> tuple[dict, dict, dict]:
    model = tiny_model("llama")
    enable_sequence_parallelism(model, dist.group.WORLD, layout=layout)
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(0))
    selected = None if ratio == 1 else torch.arange(round(1 / ratio) - 1, tokens, round(1 / ratio))[None]
    with measured() as traffic:
        model(input_ids=ids, labels=ids, selected_positions=selected).loss.backward()
    return traffic.forward, traffic.backward, vars(model.config)


@pytest.mark.parametrize("ratio", [1, 0.5, 0.1])
def test_bytes_exchanged(ratio):
    tokens, ranks, layers, itemsize = 120, 2, 4, 4
    for forward, backward, config in spawn(ranks, bytes_per_layer, "balanced", ratio, tokens):
        row = config["hidden_size"] // config["num_attention_heads"] * itemsize
        queries, keys = config["num_attention_heads"] * row, config["num_key_value_heads"] * row
        # Of a row of q, k, v and the output, all but this rank's share of heads goes to others.
        of_a_row = (2 * queries + 2 * keys) * (ranks - 1) // ranks
        selected = round(ratio * tokens) // ranks
        unselected = tokens // ranks - selected
        last_layer_without_queries = unselected * 2 * queries * (ranks - 1) // ranks
        assert forward == {"attention": layers * (selected + unselected) * of_a_row - last_layer_without_queries}
        assert backward == {"attention": layers * selected * of_a_row}


def calls_of_a_step(rank: int, selected: torch.Tensor | None, recompute: bool) -> tuple[int, int]:
    model = tokenseek.enable_token_ditching(tiny_model("llama"), recompute=recompute)
    enable_sequence_parallelism(model, dist.group.WORLD)
    ids = torch.arange(3, 27)[None]
    with measured() as traffic:
        model(input_ids=ids, labels=ids, selected_positions=selected).loss.backward()
    return traffic.forward_calls["attention"], traffic.backward_calls["attention"]


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_queries_keys_and_values_travel_together(recompute):
    """A layer's all-to-alls: two for a pass forward, q with k and v, and o; two back. The last layer's unselected rows
    end at their keys. Apart, they were six for all tokens and nine for two passes."""
    layers, again = 4, 2 * recompute  # which autograd runs backward, but are exchanges of a forward pass
    for forward, backward in spawn(2, calls_of_a_step, None, recompute):
        assert (forward, backward) == (layers * (2 + again), layers * 2)
    for forward, backward in spawn(2, calls_of_a_step, torch.tensor([[2, 7, 20]]), recompute):
        assert (forward, backward) == (layers * (4 + again) - 1, layers * 2)


# Faults


def mismatch(rank: int, what: str) -> str:
    model = tiny_model("llama")
    enable_sequence_parallelism(model, dist.group.WORLD)
    inputs = make_inputs(Case()) | dict(selected_positions=positions(Case(), {}))
    if rank == 1:
        if what == "input_ids":  # a longer batch
            inputs = make_inputs(Case(lengths=(14, 9))) | dict(selected_positions=inputs["selected_positions"])
        elif what == "attention_mask":
            del inputs["attention_mask"]
        elif what == "selected_positions":
            inputs["selected_positions"][0, 1] += 1
        else:
            inputs["labels"][0, 7] = -100
    with pytest.raises(UserError) as error:
        model(**inputs)
    model(**make_inputs(Case())).loss.backward()  # the group is none the worse for it
    return str(error.value)


@pytest.mark.parametrize("what", ["input_ids", "attention_mask", "selected_positions", "labels"])
def test_different_batches_are_refused_on_all_ranks(what):
    for rank, message in enumerate(spawn(4, mismatch, what)):
        assert what in message and "rank(s) 1" in message and f"this is rank {rank}" in message


def die_in_a_layer(rank: int) -> None:
    model = tiny_model("llama")
    enable_sequence_parallelism(model, dist.group.WORLD)
    if rank == 1:
        find_decoder(model).layers[2].mlp.register_forward_hook(lambda *_: os._exit(7))
    model(**make_inputs(Case()), selected_positions=positions(Case(), {})).loss.backward()


def test_the_death_of_a_rank_stops_the_others():
    outcomes = spawn(2, die_in_a_layer, check=False, timeout=60)
    assert outcomes[1] is None
    assert "RuntimeError" in outcomes[0]  # an error of its own, and not killed by the time limit


def group_of(ranks: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: ranks, rank=lambda: 0)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="3 sequence-parallel ranks cannot share 4 query heads.*: 1, 2, 4"):
        enable_sequence_parallelism(tiny_model("llama"), group_of(3))
    for name, value in (("layout", "striped"), ("engine", "DDP")):
        with pytest.raises(UserError, match=f"{name} is '{value}'; it must be one of"):
            enable_sequence_parallelism(tiny_model("llama"), group_of(2), **{name: value})
    with pytest.raises(UserError, match="is not enabled"):
        disable_sequence_parallelism(tokenseek.enable_token_ditching(tiny_model("llama")))


def test_models_with_attention_code_of_their_own_are_refused():
    config = AutoConfig.for_model("bloom", hidden_size=16, n_layer=2, n_head=2, vocab_size=50)
    with pytest.raises(UserError, match="AttentionInterface"):
        enable_sequence_parallelism(AutoModelForCausalLM.from_config(config), group_of(2))


def share_latents(rank: int) -> str:
    """DeepSeek's layers hand latents to their cache, and attention what they make of them with weights."""
    model = enable_sequence_parallelism(tiny("deepseek_v3"), dist.group.WORLD)
    with pytest.raises(UserError) as error:
        model(**batch_of(), selected_positions=torch.tensor([[1, 4]]))
    return str(error.value)


def test_keys_that_are_made_after_the_cache_are_refused():
    for message in spawn(2, share_latents):
        assert "in another form (latent)" in message


def test_a_copy_shares_the_group():
    model = enable_sequence_parallelism(tiny_model("llama"), group_of(2), layout="regroup")
    other = copy.deepcopy(model)
    assert ditching_of(other).sequence.layout == "regroup"
    again = tokenseek.enable_token_ditching(model, recompute=True)
    assert ditching_of(again).sequence.layout == "regroup"
