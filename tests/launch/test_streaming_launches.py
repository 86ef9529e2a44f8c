"""Streamed data through the launcher: two processes take the steps of one."""

from conftest import assert_close_steps, steps


def test_two_processes_take_the_steps_of_one(workspace, script):
    settings = [
        "data.sources.0.streaming=true",
        "scoring.mode=online",
        "selection={rule: sampled, alpha: 0, beta: 1, explore: 0.3, ratio: 0.2}",
        "training.max_steps=7",  # of 21 rows, four in a step: into the second pass
        "training.save_strategy='no'",
        "eval_data=null",
    ]

    def words(name, *more):
        settings_of_run = [*settings, f"output_dir={workspace.folder / name}", *more]
        return ["--preset", workspace.training, *(word for setting in settings_of_run for word in ("--set", setting))]

    result = script("train", *words("streamed"))
    assert result.status == 0, result
    workspace.launch("train", *words("streamed-two", "training.per_device_train_batch_size=1"), processes=2)
    one, two = steps(workspace.folder / "streamed"), steps(workspace.folder / "streamed-two")
    assert len(one) == 7
    assert_close_steps(two, one)
