"""Unselected rows in tiles where ranks share a text: the numbers are those of one process, and memory is a tile's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from distributed.sequence_cases import Case, compare
from distributed.spawn import spawn
from distributed.test_sequence_parallel import EAGER, HEADS
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import tokenseek
from benchmarks.memory import LiveStorages
from benchmarks.models import batch_of, tiny
from benchmarks.plan import LORA, measured_peak, model_config, run_config
from tokenseek.errors import UserError
from tokenseek.parallel import enable_sequence_parallelism, measured
from tokenseek.planning import Engine, Method, plan_memory

# Of one example, so that tiles have three rows, of 26, 13, 9 or 7 unselected ones on a rank of 1, 2, 3 or 4.
LONG = dict(lengths=(30,), selected=((2, 11, 12, 29),), tile_rows=3)
TILED = {
    "llama": Case(**LONG),
    "recompute": Case(**LONG, recompute=True),
    "recompute, on the host": Case(**LONG, recompute=True, kv_storage="host"),
    "on the host": Case(**LONG, kv_storage="host"),
    "LoRA": Case(**LONG, lora=True),
    "LoRA, recompute": Case(**LONG, lora=True, recompute=True),
    "window": Case("mistral", **LONG),
    "window, recompute": Case("mistral", **LONG, recompute=True),
    "gpt2": Case("gpt2", **LONG),
    "opt": Case("opt", **LONG),
    "eager": Case(model=EAGER, **LONG),
    "sinks, eager": Case("gpt_oss", EAGER, **LONG),
    "one row in a tile": Case(**LONG | dict(tile_rows=1)),
    "ragged lengths": Case(lengths=(30, 4, 17), selected=((2, 11), (3,), (0, 1, 2, 16)), tile_rows=9),
    "nothing selected in an example": Case(lengths=(30, 9), selected=((20, 29), ()), tile_rows=6),
    "selected tokens in a cluster": Case(lengths=(30,), selected=((24, 25, 26, 27),), tile_rows=3),
    "padded on the left": Case(lengths=(30, 9), left=True, selected=((1, 4, 29), (26, 28)), tile_rows=6),
    "packed": Case(lengths=(30,), packed=(11, 19), selected=((4, 10, 17, 28),), tile_rows=3),
    "one key/value head": Case(model=HEADS["4/1"], **LONG),
}
IN_LAYOUTS = {
    f"{layout}: {name}": replace(case, layout=layout)
    for layout in ("contiguous", "regroup", "blocks")
    for name, case in TILED.items()
    if layout == "contiguous" or name in ("llama", "LoRA, recompute", "window", "ragged lengths")
}
GROUPS = {
    "2": (2, TILED),
    "2, other layouts": (2, IN_LAYOUTS),
    "3": (3, {f"{heads} heads": Case(model=HEADS[heads], **LONG) for heads in ("3/3", "6/2", "6/1")}),
    # More ranks than key/value heads.
    "4": (4, {name: TILED[name] for name in ("llama", "LoRA, recompute", "window", "ragged lengths", "gpt2")}),
    "4, other layouts": (4, {name: IN_LAYOUTS[name] for name in ("contiguous: llama", "regroup: LoRA, recompute")}),
}


def compare_all(rank: int, cases: dict[str, Case]) -> dict[str, str | None]:
    return {name: compare(case, dist.group.WORLD) for name, case in cases.items()}


@cache
def results(group: str) -> list[dict[str, str | None] | str | None]:
    return spawn(GROUPS[group][0], compare_all, GROUPS[group][1], check=False, timeout=200)


@pytest.mark.parametrize("group,name", [(group, name) for group, (_, cases) in GROUPS.items() for name in cases])
def test_loss_and_gradients_are_those_of_one_process(group, name):
    for rank, outcome in enumerate(results(group)):
        assert isinstance(outcome, dict), f"rank {rank}: {outcome or 'killed, or ended without a word'}"
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"


# What travels


def traffic_of_a_step(rank: int, tile_rows: int | str) -> tuple[int, int, int, int]:
    model = tokenseek.enable_token_ditching(tiny_model("llama"), tile_rows=tile_rows)
    enable_sequence_parallelism(model, dist.group.WORLD)
    ids = torch.arange(3, 33)[None]
    with measured() as traffic:
        model(input_ids=ids, labels=ids, selected_positions=torch.tensor([[2, 11, 12, 29]])).loss.backward()
    calls = traffic.forward_calls["attention"], traffic.backward_calls["attention"]
    return *calls, traffic.forward["attention"], traffic.backward["attention"]


def test_keys_travel_once_and_queries_by_tile():
    """In a layer: keys and values of the unselected rows, then both ways of the selected ones, then of each tile."""
    layers, tiles = 4, 5  # of 13 rows on a rank
    at_once, in_tiles = spawn(2, traffic_of_a_step, "auto"), spawn(2, traffic_of_a_step, 3)
    for one, other in zip(at_once, in_tiles, strict=True):
        assert one[:2] == (layers * 4 - 1, layers * 2), "few rows are worth no tiles"
        assert other[:2] == (layers * 3 + (layers - 1) * 2 * tiles, layers * 2)
        assert one[2:] == other[2:], "bytes"


# Memory


def peak_of_a_step(rank: int, tile_rows: int, layout: str) -> int:
    """Without the model's states; most of it is in the feed-forward layer of the unselected rows."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=64, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    tokenseek.enable_token_ditching(model, recompute=True, tile_rows=tile_rows)
    enable_sequence_parallelism(model, dist.group.WORLD, layout=layout)
    ids = torch.arange(1, 2049)[None] % 64
    with LiveStorages().ignore(model.parameters()) as live:
        model(input_ids=ids, labels=ids, selected_positions=torch.arange(31, 2048, 32)[None]).loss.backward()
    return live.peak


@pytest.mark.parametrize("layout", ["balanced", "contiguous", "regroup"])
def test_a_layer_holds_one_tile(layout):
    of_all_rows = 3 * 992 * 1024 * 4  # gate, up and their product, of the rows of a rank
    at_once, in_tiles = (spawn(2, peak_of_a_step, rows, layout) for rows in (10**9, 128))
    for one, other in zip(at_once, in_tiles, strict=True):
        assert one > of_all_rows
        assert other < one - 0.8 * of_all_rows


SIZES = dict(hidden=64, layers=2, vocab=512, tokens=16384)


def plan_and_measure(rank: int) -> dict[str, tuple[int, int, int, int]]:
    results = {}
    # Where a rule would select them on average: masks of tiles are as long as the gaps between rows are.
    count = round(0.1 * SIZES["tokens"])
    selected = torch.arange(1, count + 1)[None] * SIZES["tokens"] // count - 1
    for tile_rows in (512, 10**9):
        config = run_config(SIZES["tokens"], *LORA, f"training.tile_rows={tile_rows}")
        method, shape = Method(0.1, recompute=True), model_config("llama", **SIZES)
        plan = plan_memory(config, method, Engine("single", 2, sp_size=2, on_cpu=True), model_config=shape)
        with measured() as traffic:
            peak = measured_peak(config, method, shape, group=dist.group.WORLD, selected=selected)
        calls = traffic.forward_calls["attention"]
        results[tile_rows] = plan.peak, peak, plan.work.sent, sum(traffic.forward.values()), calls
    return results


def test_a_long_step_takes_what_is_planned():
    for of_rank in spawn(2, plan_and_measure, timeout=300):
        (planned, peak, planned_sent, *_), at_once = of_rank[512], of_rank[10**9]
        assert planned == pytest.approx(peak, rel=0.003)
        assert at_once[0] == pytest.approx(at_once[1], rel=0.003)
        assert peak < 0.5 * at_once[1]
        # The plan runs some of fifteen tiles, which are of a row more or less.
        assert planned_sent == pytest.approx(at_once[2], rel=0.001)


# Faults


def share_latents(rank: int) -> str:
    model = tokenseek.enable_token_ditching(tiny("deepseek_v3"), tile_rows=1)
    enable_sequence_parallelism(model, dist.group.WORLD)
    with pytest.raises(UserError) as error:
        model(**batch_of(), selected_positions=torch.tensor([[1, 7]]))
    return str(error.value)


def test_keys_that_are_made_after_the_cache_are_refused():
    for message in spawn(2, share_latents):
        assert "in another form (latent)" in message
