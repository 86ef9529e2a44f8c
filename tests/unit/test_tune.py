"""Tuning: the grid, the choice, and a preset that trains."""

import argparse

import pytest
from tiny_preset import tiny_preset

from tokenseek.commands import tune as command
from tokenseek.config import load_config, override_config, save_resolved
from tokenseek.errors import UserError
from tokenseek.sweeps.tables import Group
from tokenseek.sweeps.tune import Grid, choose, short_runs, table, tune, tune_sweep


@pytest.fixture
def config(tmp_path):
    return tiny_preset(tmp_path, "training.warmup_steps=100", "training.save_strategy=steps")


def group(alpha, ratio, *losses):
    row = {"loss_before": 3.0, "supervised_share": 0.5, "seconds": 1.0, "peak_memory_bytes": 2**30}
    return Group((alpha, 5.0, ratio), [{**row, "loss_after": loss} for loss in losses])


def test_the_preset_that_is_chosen_trains_on_the_same_index(config, tmp_path, capsys):
    grid = Grid(weights=[(1, 0), (0, 1)], ratios=[0.2, 0.4], steps=2, hold_out=3)
    preset = tune(config, grid)
    out = capsys.readouterr().out
    assert preset == tmp_path / "run" / "tune" / "preset.yaml"
    assert out.count("held-out loss ") >= 4 and "Chosen: selection.alpha" in out and "| 1 | 0 | 0.2 |" in out
    chosen = load_config(preset)
    rows = tune_sweep(config, grid).rows()
    best = min(rows, key=lambda row: row["loss_after"])
    selection = {name: best[name] for name in ("alpha", "beta", "ratio")}
    assert chosen.selection.model_dump(include=set(selection)) == selection
    # All else is as it was, and the index, of all examples, serves the run.
    settings = {f"selection.{name}": value for name, value in selection.items()}
    assert chosen == override_config(config, {**settings, "scoring.index": str(config.index_path)})
    assert chosen.index_path.exists() and chosen.data.hold_out is None and chosen.training.warmup_steps == 100
    # A second time everything is there.
    tune(config, grid, tmp_path / "elsewhere.yaml")
    assert "left)" not in capsys.readouterr().out and load_config(tmp_path / "elsewhere.yaml") == chosen


def test_short_runs_keep_what_is_learned(config):
    short = short_runs(config, 20, 3)
    assert (short.training.max_steps, short.training.warmup_steps, short.data.hold_out) == (20, 2, 3)
    assert short.training.save_strategy == "no" and short.index_path == config.index_path
    assert short.training.learning_rate == config.training.learning_rate
    own = override_config(config, {"eval_data": config.data.model_dump(mode="json")})
    assert short_runs(own, None, 3).data.hold_out is None
    assert short_runs(own, None, 3).training.max_steps == config.training.max_steps


def test_the_least_loss_is_chosen_or_a_smaller_ratio_near_it():
    groups = [group(1, 0.1, 2.0, 2.2), group(5, 0.1, 2.05), group(5, 0.5, 2.0, 1.9)]
    assert choose(groups, 0.0) is groups[2]
    assert choose(groups, 0.1) is groups[1], "the mean of seeds counts"
    assert choose(groups, 1.0) is groups[1]
    failed = Group((9.0, 9.0, 0.9), [{"error": "out of memory"}])
    assert choose([failed, *groups], 0.0) is groups[2]
    assert "| 9 | 9 | 0.9 | out of memory |  |  |  |" in table([failed])
    assert "| 1 | 5 | 0.1 | 2.1000 (2.0000 to 2.2000) | 50% | 1.0 | 1.00 GiB |" in table(groups)
    with pytest.raises(UserError, match="no run finished: out of memory"):
        choose([failed], 0.0)


ONLINE = ("scoring.mode=online", "selection.rule=sampled", "selection.alpha=0", "selection.explore=0.3")


def test_any_setting_is_tried_and_the_best_is_told_as_it_is_set(tmp_path, capsys):
    """Steps that select their own tokens: no index is made or named."""
    config = tiny_preset(tmp_path, *ONLINE)
    grid = Grid(settings={"training.learning_rate": [0.0, 0.01], "selection.ratio": [0.1, 0.4]}, steps=2, hold_out=3)
    preset = tune(config, grid)
    out = capsys.readouterr().out
    rows = tune_sweep(config, grid).rows()
    assert [(row["training.learning_rate"], row["selection.ratio"]) for row in rows] == [
        (0.0, 0.1),
        (0.0, 0.4),
        (0.01, 0.1),
        (0.01, 0.4),
    ]
    before = rows[0]["loss_before"]
    assert rows[0]["loss_after"] == pytest.approx(before) and rows[2]["loss_after"] < before
    best = min(rows, key=lambda row: row["loss_after"])["selection.ratio"]
    assert f"  --set training.learning_rate=0.01 --set selection.ratio={best}\n" in out
    assert "| training.learning_rate | selection.ratio | held-out loss |" in out and "| 0.01 | 0.4 |" in out
    chosen = load_config(preset)
    assert chosen == override_config(config, {"training.learning_rate": 0.01, "selection.ratio": best})
    tune(config, grid)
    assert "left)" not in capsys.readouterr().out
    assert len(tune_sweep(config, Grid(settings={**grid.settings, "peft.r": [8]})).trials) == 4


def test_ordinary_training_takes_a_grid_of_learning_rates(config):
    ordinary = override_config(config, {"training.ditching": False})
    sweep = tune_sweep(ordinary, Grid(settings={"training.learning_rate": [1e-3, 2e-3]}, seeds=2))
    assert [trial.name for trial in sweep.trials][:2] == ["learning_rate-0.001-seed-0", "learning_rate-0.002-seed-0"]
    assert {sweep.config(trial).seed for trial in sweep.trials} == {0, 1}
    with pytest.raises(UserError, match="(?s)trial .*training.learning_rate"):
        tune_sweep(ordinary, Grid(settings={"training.learning_rate": ["high"]}))
    with pytest.raises(UserError, match="selection.ratio is tried by --grid and by --weights or --ratios"):
        tune_sweep(config, Grid(ratios=[0.1], settings={"selection.ratio": [0.1]}))


@pytest.mark.parametrize(
    "words,message",
    [
        (["training.learning_rate"], "write SETTING=VALUE,VALUE"),
        (["training.learning_rate="], "write SETTING=VALUE,VALUE"),
        (["training.learning_rate=1e-3,"], None),
        (["selection.ratio=0.1", "selection.ratio=0.2"], "given twice"),
        (["seed=1,2"], "set by --seeds"),
        (["training.max_steps=5"], "set by --steps"),
        (["data.max_length=64"], "training, selection, scoring, peft can be tried"),
        (["training.learning_rat=1"], "training.learning_rat.*did you mean learning_rate"),
    ],
)
def test_words_of_a_grid(words, message, config, tmp_path):
    save_resolved(config, tmp_path / "preset.yaml")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    line = [part for word in words for part in ("--grid", word)]
    args = parser.parse_args(["--preset", str(tmp_path / "preset.yaml"), *line])
    if message is None:
        assert command.read_grid(args.grid) == {"training.learning_rate": [0.001]} and command.check(args) == config
        return
    with pytest.raises(UserError, match=message):
        command.check(args)


def test_what_has_no_scores_cannot_be_tuned(config):
    for settings in ({"selection.rule": "random"}, {"training.ditching": False}):
        with pytest.raises(UserError, match="does not; set"):
            tune_sweep(override_config(config, settings), Grid())
