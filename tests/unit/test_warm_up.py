"""A warm-up never takes the whole of a run without a word."""

import torch
from tiny_models import tiny_model
from transformers import TrainingArguments

from tokenseek.training import GroupTrainer


def rates(tmp_path, warmup_steps, steps):
    """The learning rates of a run's steps, of 1."""
    arguments = TrainingArguments(
        str(tmp_path),
        warmup_steps=warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        use_cpu=True,
        report_to="none",
    )
    trainer = GroupTrainer(tiny_model("llama"), arguments)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = trainer.create_scheduler(steps, optimizer)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_a_share_of_less_than_a_step_is_none(tmp_path, caplog):
    caplog.set_level("INFO", logger="tokenseek")
    assert rates(tmp_path, 0.03, 1) == [1]
    assert "warm-up: 3% of 1 step is less than a step, so there is none" in caplog.text
    assert rates(tmp_path, 0.03, 33) == [1] * 33
    assert rates(tmp_path, 0.03, 34)[:3] == [0, 0.5, 1]  # rounded up, as Transformers does


def test_a_number_of_steps_is_kept(tmp_path, caplog):
    assert rates(tmp_path, 2, 4) == [0, 0.5, 1, 1] and not caplog.text
    assert rates(tmp_path, 4, 4) == [0, 0.25, 0.5, 0.75]
    assert "warmup_steps is 4 and the run has 4 steps: the learning rate rises to the end" in caplog.text


def test_a_run_that_trains_nothing_is_told(tmp_path, caplog):
    assert rates(tmp_path, 5, 1) == [0]
    assert "warmup_steps is 5 and the run has one step, whose learning rate is 0: nothing is trained" in caplog.text
