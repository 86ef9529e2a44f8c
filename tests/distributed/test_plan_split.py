"""Plans of steps that select their own tokens where an engine splits the weights, against real steps under FSDP2."""

from __future__ import annotations

import pytest
import torch
from distributed.spawn import spawn
from distributed.test_fsdp import shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from benchmarks.plan import ONLINE, model_config, run_config
from tokenseek.ditching import Seeking, enable_token_ditching
from tokenseek.planning import Engine, Method, plan_memory
from tokenseek.planning.work import Work

RANKS, TOKENS = 2, 384
SHAPE = model_config("llama", hidden=128, layers=4, vocab=1000, tokens=TOKENS)
MODEL = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32)
CASES = {
    "error": "scoring.reduction=error",
    "gradient": "selection.exact_layers=0",
    "exact layer": "selection.exact_layers=1",
    "exact layers": "selection.exact_layers=2",
}


class GatheredBytes(TorchDispatchMode):
    """Adds up the bytes that all-gathers return."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "allgather" in func.name():
            self.total += args[0].nbytes
        return func(*args, **(kwargs or {}))


def measured(rank: int) -> dict[str, tuple[int, int]]:
    """By case: floating-point operations of a forward and a backward pass, and the bytes that they gather."""
    mesh, found = init_device_mesh("cpu", (RANKS,)), {}
    for name, setting in CASES.items():
        torch.manual_seed(0)
        config = run_config(TOKENS, *ONLINE, setting)
        model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32, attn_implementation="sdpa").train()
        seeking = Seeking(config.scoring.reduction, exact_layers=config.selection.exact_layers)
        shard(enable_token_ditching(model, seeking=seeking), mesh)
        ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(rank))
        batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        selection = dict(selection=config.selection.to_rule(), selection_keys=torch.tensor([rank]))
        with Work() as work, GatheredBytes() as gathered:
            model(**batch, **selection).loss.backward()
        found[name] = work.flops, gathered.total
    return found


@pytest.fixture(scope="module")
def steps():
    return spawn(RANKS, measured)[0]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("case", CASES)
def test_a_plan_runs_and_gathers_what_a_real_step_does(case, engine, steps):
    flops, gathered = steps[case]
    plan = plan_memory(
        run_config(TOKENS, *ONLINE, CASES[case]), Method(0.2), Engine(engine, RANKS, on_cpu=True), model_config=SHAPE
    )
    # Where the drawn tokens stand differs, which attention takes note of.
    assert plan.work.flops == pytest.approx(flops, rel=0.01)
    layer, whole = (_nbytes(module) for module in (MODEL.model.layers[0], MODEL))
    outside = whole - 4 * layer
    # Of two ranks, each sends half of what is gathered, and half of the gradients.
    planned = 2 * plan.work.sent - whole
    # Counted three times in a plan, and gathered once by this FSDP2, whose root keeps it. In the backward pass FSDP2
    # fetches a layer ahead, also before the first one: the last of the pass over all tokens.
    norm = 2 * _nbytes(MODEL.model.norm)
    assert planned - 3 * outside == pytest.approx(gathered - outside - layer, abs=norm)


def test_whole_weights_need_no_second_pass_of_exact_layers():
    """Neither forwards nor backwards to the border; attention's backward pass is two and a half of its forward one."""
    config = run_config(TOKENS, *ONLINE, CASES["exact layers"])
    split, whole = (
        plan_memory(config, Method(0.2), Engine(engine, RANKS, on_cpu=True), model_config=SHAPE).work.flops
        for engine in ("zero3", "zero2")
    )
    matrices = 2 * _nbytes(MODEL.model.layers[0]) // 4 + MODEL.lm_head.weight.numel()
    attention = 2 * 4 * SHAPE.hidden_size * TOKENS**2
    assert split - whole == pytest.approx(2 * 2 * TOKENS * matrices + 3.5 * attention, rel=0.005)


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
