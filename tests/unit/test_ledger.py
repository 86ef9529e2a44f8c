"""The planner's ledger of storages, over time: what is alive on average, and what is put away."""

from __future__ import annotations

import pytest
import torch
from unit.test_planning import CPU, LLAMA, SIZES, run_config

from benchmarks.plan import CASES, measured_average, model_config
from tokenseek.planning import Method, plan_memory
from tokenseek.planning.ledger import Ledger


def test_ledger_averages_over_time():
    seconds = iter([0.0, 0.0, 2.0, 5.0, 6.0, 10.0])  # made, begun, born, born, freed, ended
    with Ledger(clock=lambda: next(seconds)) as ledger:
        ledger.reset_time()
        kept = torch.empty(256)  # at 2 s
        gone = torch.empty(512)  # at 5 s
        del gone  # at 6 s
        ledger.note_time()
    assert (ledger.byte_seconds, ledger.seconds) == (1024 * 3 + 3072 * 1 + 1024 * 4, 10.0)
    assert kept.nbytes == ledger.total


@pytest.mark.parametrize("case", ["llama, r = 0.1, LoRA", "llama, all tokens, LoRA, recomputed", "gpt2, r = 0.2"])
def test_planned_average_is_that_of_a_real_step(case):
    """Whose moments are weighted by the same estimates of time, and whose memory another counter follows."""
    kind, method, settings = CASES[case]
    config, shape = run_config(*settings), model_config(kind, **SIZES)
    planned = plan_memory(config, method, CPU, model_config=shape)
    assert planned.average == pytest.approx(measured_average(config, method, shape), rel=0.03)
    assert planned.states < planned.average < planned.peak


def test_micro_batches_weigh_in_the_planned_average():
    """With many of them, the optimizer's part of a step, in which no activation is alive, counts for less."""
    averages = [
        plan_memory(run_config(f"training.gradient_accumulation_steps={n}"), Method(), CPU, model_config=LLAMA).average
        for n in (2, 8)
    ]
    assert averages[0] < averages[1]


def test_ledger_moves_and_frees():
    with Ledger() as ledger:
        kept = torch.zeros(256)
        ledger.track([kept], "gradients")
        ledger.track([torch.zeros(64)], "logits")
        view = kept[:10]
        assert ledger.alive["gradients"] == 1024 and ledger.alive["logits"] == 0
        del kept
        assert ledger.alive["gradients"] == 1024  # the view keeps it
        del view
        assert ledger.total == 0
    assert ledger.peak == 1280
