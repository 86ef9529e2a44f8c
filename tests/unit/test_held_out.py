"""Runs that go by the held-out loss: early stopping, the best checkpoint, samples; and the line of progress."""

import json
import re

import pytest
from helpers import tiny_tokenizer
from safetensors.torch import load_file
from tiny_preset import tiny_preset
from torch import equal

from tokenseek.config import load_config
from tokenseek.errors import UserError
from tokenseek.runs.prompts import render_prompts
from tokenseek.runs.train import train
from tokenseek.training import GroupTrainer
from tokenseek.training.progress import format_seconds

EVALUATED = (
    "selection.rule=random",
    "data.hold_out=3",
    "training.eval_strategy=steps",
    "training.eval_steps=1",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.save_total_limit=null",
    "training.lr_scheduler_type=constant",
    "training.warmup_steps=0",
)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_no_longer_learns_ends(tmp_path, capsys):
    settings = (*EVALUATED, "training.early_stopping_patience=2", "training.learning_rate=0", "training.max_steps=9")
    prompts = ("training.sample_prompts=['How many?', 'And then?']",)
    assert train(tiny_preset(tmp_path, *settings, *prompts)).steps == 3
    out = capsys.readouterr().out
    assert re.search(r"\nstep 1/9  loss [\d.]+  [\d,]+ tokens/s  [\d.]+ [MG]iB resident  .+ left\n", out)
    assert re.search(
        r"\ndone: 3 steps in .+ s, held-out loss [\d.]+ -> [\d.]+, [\d.]+ MiB at the peak of a step\. ", out
    )
    assert f"`tokenseek chat {tmp_path / 'run'}`" in out
    assert len(re.findall(r"\nstep \d  held-out loss \d", out)) == 3 + 1  # once before training
    assert out.count("sample at step 3: How many?\n  ") == 1 and "{'loss'" not in out
    samples = [line["samples"] for line in lines(tmp_path / "run") if "samples" in line]
    assert len(samples) == 3 and [sample["prompt"] for sample in samples[0]] == ["How many?", "And then?"]
    assert samples[0] == samples[2] and samples[0][0]["text"]  # greedy, of weights that did not move
    train(tiny_preset(tmp_path, *settings, "training.sample_prompts=[]"))
    assert "is finished: 3 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="training.early_stopping_patience: 2 there, 3 now"):
        train(tiny_preset(tmp_path, *settings, "training.early_stopping_patience=3"))


def test_the_best_checkpoint_is_kept(tmp_path, capsys):
    settings = ("training.load_best=true", "training.learning_rate=1", "training.max_steps=3")
    train(tiny_preset(tmp_path, *EVALUATED, *settings))
    run = tmp_path / "run"
    losses = {line["step"]: line["eval_loss"] for line in lines(run) if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert len(losses) == 3 and best < 3
    assert f"Lowest held-out loss at step {best}" in capsys.readouterr().out
    final, kept, last = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run / "final", run / f"checkpoint-{best}", run / "checkpoint-3")
    )
    assert all(equal(final[name], kept[name]) for name in kept)
    assert not all(equal(final[name], last[name]) for name in kept)


@pytest.mark.parametrize("ditching", ["true", "false"])
def test_evaluations_are_means_over_tokens_as_the_held_out_loss_is(tmp_path, ditching, monkeypatch):
    """Answers differ in length, so that Trainer's mean over batches is another number, and may choose another step."""
    settings = (*EVALUATED, f"training.ditching={ditching}", "training.per_device_eval_batch_size=2")
    summary = train(tiny_preset(tmp_path, *settings, "training.load_best=true", "training.learning_rate=0.01"))
    losses = [line["eval_loss"] for line in lines(tmp_path / "run") if "eval_loss" in line]
    assert len(losses) == 2 and summary.loss_after == min(losses)
    monkeypatch.setattr("tokenseek.training.groups.held_out_loss", None)
    monkeypatch.setattr(GroupTrainer, "token_mean", property(lambda _: False, lambda *_: None), raising=False)
    train(tiny_preset(tmp_path, *settings, "training.learning_rate=0.01", f"output_dir={tmp_path / 'trainers'}"))
    of_batches = [line["eval_loss"] for line in lines(tmp_path / "trainers") if "eval_loss" in line]
    assert all(abs(a - b) > 1e-5 for a, b in zip(losses, of_batches, strict=True))


@pytest.mark.parametrize(
    "settings,message",
    [
        (["training.early_stopping_patience=2"], "training.early_stopping_patience needs evaluation.*data.hold_out"),
        (["training.load_best=true", "training.save_strategy=best"], "training.load_best needs evaluation"),
        (["training.sample_prompts=[a]"], "training.sample_prompts needs evaluation"),
        ([*EVALUATED, "training.load_best=true", "training.save_strategy=epoch"], "load_best takes the best of the ch"),
        ([*EVALUATED, "training.load_best=true", "training.eval_steps=2"], "not accept.*multiple"),
        (["training.early_stopping_patience=0"], "early_stopping_patience"),
    ],
)
def test_what_evaluates_needs_evaluation(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenseek.runs.train.load_model", None)
    with pytest.raises(UserError, match=f"(?s){message}"):
        train(tiny_preset(tmp_path, *settings))


def test_logging_is_checked_before_any_data_is_read(tmp_path):
    with pytest.raises(UserError, match="training.report_to: wandb"):
        train(tiny_preset(tmp_path, "data.sources.0.path=missing.jsonl", "training.report_to=[wandb]"))


def test_samples_need_a_process_that_has_the_model(tmp_path, monkeypatch):
    config = tiny_preset(tmp_path, *EVALUATED, "training.sample_prompts=[a]")
    monkeypatch.setattr("tokenseek.runs.preparation.require_engine", lambda *_: None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="training.sample_prompts are continued by one process.*ddp.yaml"):
        train(config)


@pytest.mark.parametrize(
    "kind,text",
    [
        ("instruction", "### Instruction:\nHi\n\n### Response:\n"),
        ("chat", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("auto", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("text", "Hi"),
    ],
)
def test_prompts_are_rendered_as_the_data_is(kind, text):
    base = ["model.name_or_path=m", "output_dir=o", "data.sources.0.path=d.jsonl"]
    data = load_config(None, [*base, f"data.sources.0.kind={kind}"]).data
    [(rendered, adds)] = render_prompts(data, ["Hi"], tiny_tokenizer())
    assert rendered.endswith(text) and adds == ("<|im_start|>" not in text)


def test_times_are_readable():
    assert [format_seconds(s) for s in (5, 100, 3700)] == ["5 s", "2 min", "1 h 02 min"]
