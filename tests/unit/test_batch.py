"""`training.per_device_train_batch_size: auto`: the largest micro batch that fits, with as many rows in a step."""

from types import SimpleNamespace

import pytest
from accelerate import PartialState
from tiny_preset import tiny_preset

from tokenseek.config import load_config, save_resolved
from tokenseek.errors import UserError
from tokenseek.planning import Engine, method_of, plan_memory
from tokenseek.runs import batch
from tokenseek.runs.batch import largest_batch, settle_batch, with_batch
from tokenseek.runs.train import train

TOKENS = 64
AUTO = ("training.per_device_train_batch_size=auto", "training.gradient_accumulation_steps=12", "selection.rule=random")


@pytest.fixture
def config(tmp_path):
    return tiny_preset(tmp_path, *AUTO)


def budget_for(config, size):
    of_size = with_batch(config, size)
    return plan_memory(of_size, method_of(of_size), Engine(on_cpu=True), tokens=TOKENS).peak


def test_the_largest_that_fits_is_taken_and_a_step_keeps_its_rows(config, tmp_path, capsys):
    budget = budget_for(config, 4)
    config = tiny_preset(tmp_path, *AUTO, f"training.memory_budget='{budget}'")
    settled = settle_batch(config, None, TOKENS, PartialState(cpu=True)).training
    assert (settled.per_device_train_batch_size, settled.gradient_accumulation_steps) == (4, 3)
    assert settled.memory_budget is None
    assert "per_device_train_batch_size: auto: 4 x 3 micro batches a step" in capsys.readouterr().out


def test_few_sizes_are_planned(config, monkeypatch):
    """A plan of a large model takes ten seconds. Memory that is not linear in the rows is met all the same."""
    planned = []

    def plan(of_size, *_, **__):
        planned.append(size := of_size.training.micro_batch)
        assert size * of_size.training.gradient_accumulation_steps == 12
        return SimpleNamespace(peak=peaks[size])

    monkeypatch.setattr(batch, "plan_memory", plan)
    peaks = {size: 100 + 10 * size for size in (1, 2, 3, 4, 6, 12)}
    for budget, size, plans in ((220, 12, 3), (219, 6, 3), (130, 3, 3), (129, 2, 2), (110, 1, 2)):
        planned.clear()
        assert largest_batch(config, budget, Engine(), TOKENS) == (size, peaks[size])
        assert len(planned) == plans
    peaks |= {12: 300, 6: 200}
    assert largest_batch(config, 190, Engine(), TOKENS) == (4, 140)
    with pytest.raises(UserError, match="auto: one row of 64 tokens needs 0.0 MiB, .* may be taken. Lower"):
        largest_batch(config, 109, Engine(), TOKENS)


def test_a_run_that_goes_on_keeps_its_size(config, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "plan_memory", None)
    run = tmp_path / "run"
    run.mkdir()
    save_resolved(with_batch(config, 3), run / "config.yaml")
    settled = settle_batch(config, str(run / "checkpoint-5"), TOKENS, PartialState(cpu=True)).training
    assert (settled.per_device_train_batch_size, settled.gradient_accumulation_steps) == (3, 4)
    one = tiny_preset(tmp_path, *AUTO, "training.gradient_accumulation_steps=1")
    assert settle_batch(one, None, TOKENS, PartialState(cpu=True)).training.micro_batch == 1


def test_a_run_trains_with_it_and_goes_on(tmp_path, capsys):
    settings = (*AUTO, "training.gradient_accumulation_steps=4", "training.memory_budget=64GiB")
    assert train(tiny_preset(tmp_path, *settings)).steps == 2
    assert "auto: 4 x 1 micro batches" in capsys.readouterr().out
    saved = load_config(tmp_path / "run" / "config.yaml").training
    assert (saved.per_device_train_batch_size, saved.gradient_accumulation_steps) == (4, 1)
    assert train(tiny_preset(tmp_path, *settings)).steps == 2
    assert "is finished" in capsys.readouterr().out


def test_what_excludes_each_other(tmp_path, config):
    with pytest.raises(UserError, match="both auto; each takes what memory is free"):
        tiny_preset(tmp_path, *AUTO, "selection.rule=top", "selection.ratio=auto")
    with pytest.raises(UserError, match="memory_budget is for selection.ratio: auto and training.per_device"):
        tiny_preset(tmp_path, "training.memory_budget=8GiB")
    with pytest.raises(UserError, match="per_device_train_batch_size is auto, which is settled when training starts"):
        plan_memory(config)
