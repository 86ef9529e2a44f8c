"""Sweeps: each trial once, whoever runs it and whatever is killed; rows are what `train` says."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_preset import tiny_preset

from tokenseek.config import override_config
from tokenseek.data import hold_out, prepare_dataset
from tokenseek.errors import UserError
from tokenseek.models.loading import load_tokenizer
from tokenseek.sweeps import sweep as engine
from tokenseek.sweeps.sweep import Sweep, Trial, append_row, lock, read_rows

TRIALS = [
    Trial("full", {"training.ditching": False}, {"rule": "full"}),
    Trial("context", {"selection.alpha": 1, "selection.beta": 0}, {"rule": "context"}),
    Trial("random", {"selection.rule": "random", "seed": 1}, {"rule": "random"}),
]


@pytest.fixture
def config(tmp_path):
    return tiny_preset(tmp_path, "data.hold_out=3", "selection.ratio=0.3")


@pytest.fixture
def counted(monkeypatch):
    """Names of the trials that are trained, in order, with the loss before that they are given."""
    ran, train = [], engine.train

    def counting(config, loss_before):
        ran.append((os.path.basename(config.output_dir), loss_before))
        return train(config, loss_before)

    monkeypatch.setattr(engine, "train", counting)
    return ran


def test_every_trial_is_a_row_and_none_is_run_twice(config, tmp_path, counted):
    told = []
    rows = Sweep(tmp_path / "sweep", config, TRIALS[:2]).run(told.append)
    assert [(row["trial"], row["rule"]) for row in rows] == [("full", "full"), ("context", "context")]
    assert [line.split(":")[0] for line in told] == ["full", "context"] and "0 left" in told[-1]
    full, context = rows
    assert full["selected_share"] == 1 and context["selected_share"] == pytest.approx(0.3, abs=0.02)
    assert full["loss_before"] == context["loss_before"] and full["loss_after"] != context["loss_after"]
    assert full["steps"] == 2 and context["settings"] == TRIALS[1].settings
    folder = tmp_path / "sweep" / "trials" / "context"
    assert "Selection in the first 9 examples" in (folder / "log.txt").read_text()
    assert (folder / "metrics.jsonl").exists() and not (folder / "final").exists()
    assert (tmp_path / "run" / "index.arrow").exists(), "one index, that of the configuration"
    # The trials that came later know the loss before from the first, and only the new one is run.
    rows = Sweep(tmp_path / "sweep", config, TRIALS).run(told.append)
    assert [name for name, _ in counted] == ["full", "context", "random"]
    assert [before for _, before in counted] == [None, full["loss_before"], full["loss_before"]]
    assert len(rows) == 3
    # The same run under another name is not run again.
    twin = Trial("twin", TRIALS[0].settings, {"rule": "twin"})
    rows = Sweep(tmp_path / "sweep", config, [*TRIALS, twin]).run()
    assert len(counted) == 3 and rows[3] == {**rows[0], "trial": "twin", "rule": "twin"}
    # Another configuration is another trial, of the same name or not.
    changed = override_config(config, {"training.learning_rate": 1e-5})
    assert Sweep(tmp_path / "sweep", changed, TRIALS).rows() == []


def test_trials_that_change_scoring_have_an_index_of_their_own(config, tmp_path):
    layers = [Trial(f"layer-{k}", {"scoring.gradient_layer": k, "seed": s}) for s in (0, 1) for k in (1, 2)][1:]
    layers = [Trial(f"{trial.name}-{trial.settings['seed']}", trial.settings) for trial in layers]
    sweep = Sweep(tmp_path / "sweep", config, layers)
    indexes = {trial.name: sweep.config(trial).index_path for trial in layers}
    assert indexes["layer-2-0"] == indexes["layer-2-1"] != indexes["layer-1-1"]
    assert indexes["layer-1-1"] == config.index_path, "which is its own setting, said once more"


def test_a_measure_sees_the_trained_model(config, tmp_path):
    def measure(config, summary):
        assert os.path.exists(os.path.join(summary.final, "adapter_model.safetensors"))
        return {"score": config.seed + 0.5}

    (row,) = Sweep(tmp_path / "sweep", config, TRIALS[2:], measure).run()
    assert row["score"] == 1.5


def test_out_of_memory_is_a_result(config, tmp_path, monkeypatch):
    def train(config, loss_before):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB.")

    monkeypatch.setattr(engine, "train", train)
    told = []
    sweep = Sweep(tmp_path / "sweep", config, TRIALS[:1])
    (row,) = sweep.run(told.append)
    assert row["error"] == "CUDA out of memory" and "CUDA out of memory" in told[0]
    assert sweep.run() == [row]


def test_mistakes_are_told_before_any_work(config, tmp_path):
    with pytest.raises(UserError, match="trial x: 1 problem.*\n.*selection.ratio"):
        Sweep(tmp_path / "sweep", config, [Trial("x", {"selection.ratio": 7})])
    with pytest.raises(UserError, match="names of their own"):
        Sweep(tmp_path / "sweep", config, [TRIALS[0], TRIALS[0]])
    assert not (tmp_path / "sweep").exists()


def test_half_a_row_is_none_and_is_written_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"key": "a"})
    with open(path, "a") as file:
        file.write('{"key": "b", "lo')
    assert read_rows(path) == [{"key": "a"}]
    append_row(path, {"key": "c"})
    assert read_rows(path) == [{"key": "a"}, {"key": "c"}]
    assert path.read_text().count("\n") == 2


HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"


def test_a_lock_is_one_processs_until_it_dies(tmp_path):
    path = tmp_path / "a"
    command = [sys.executable, "-c", HOLDER, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"1\n"
        with lock(path) as mine:
            assert not mine
    finally:
        process.kill()
        process.communicate()
    with lock(path) as mine:
        assert mine


def test_trials_of_others_are_waited_for(config, tmp_path, monkeypatch, counted):
    """Another process has the first trial and finishes it while this one waits."""
    sweep = Sweep(tmp_path / "sweep", config, TRIALS[:2])
    other = Sweep(tmp_path / "other", config, TRIALS[:1])
    (row,) = other.run()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        append_row(sweep.rows_file, row)

    monkeypatch.setattr(engine.time, "sleep", sleep)
    with lock(tmp_path / "sweep" / "locks" / sweep.key(TRIALS[0])):
        rows = sweep.run()
    assert waited and [name for name, _ in counted] == ["full", "context"]
    assert [r["trial"] for r in rows] == ["full", "context"] and rows[0] == row


def test_hold_out_keeps_its_examples_from_training(config):
    tokenizer = load_tokenizer(config.model)
    whole = prepare_dataset(config.data, tokenizer)
    kept, held = hold_out(whole.dataset, 3, seed=0)
    assert len(kept) == 9 and len(held) == 3
    assert sorted([*kept["example_id"], *held["example_id"]]) == whole.dataset["example_id"][:]
    assert held["example_id"][:] == hold_out(whole.dataset, 3, seed=0)[1]["example_id"][:]
    assert held["example_id"][:] != hold_out(whole.dataset, 3, seed=1)[1]["example_id"][:]
    without = override_config(config, {"data.hold_out": None})
    assert prepare_dataset(without.data, tokenizer).fingerprints == whole.fingerprints  # one index serves both
    with pytest.raises(UserError, match="data.hold_out is 12, and there are 12 examples"):
        hold_out(whole.dataset, 12, seed=0)
    with pytest.raises(UserError, match="data.hold_out keeps evaluation data back"):
        override_config(config, {"eval_data": json.loads(config.data.model_dump_json())})
