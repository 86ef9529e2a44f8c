"""Runs whose steps select their own tokens: no index, `loss_all` in the log, repeatable when resumed; settings."""

import json
import logging
import shutil

import pytest
import torch
from accelerate import PartialState
from helpers import tiny_tokenizer, write_jsonl
from peft import PeftModel
from tiny_models import tiny_model
from tiny_preset import tiny_preset
from transformers import AutoModelForCausalLM

from tokenseek import SelectionRule, TokenSeekCollator, UserError, finetune
from tokenseek.config import load_config
from tokenseek.data.toy import make_word_problems
from tokenseek.runs.exact import settle_exact_layers
from tokenseek.runs.train import train

ONLINE = (
    "scoring.mode=online",
    "selection.rule=sampled",
    "selection.ratio=0.1",
    "selection.alpha=0",
    "selection.beta=1",
    "selection.explore=0.3",
    "selection.scope=supervised",
    "training.logging_steps=1",
)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [(), ("selection.exact_layers=1",), ("scoring.reduction=error",)], ids=str)
def test_no_index_is_made_and_the_loss_of_all_tokens_is_logged(tmp_path, settings):
    ordinary = train(tiny_preset(tmp_path, "training.ditching=false", "training.logging_steps=1", "peft=null"))
    expected = lines(tmp_path / "run")[0]["loss"]
    run = tmp_path / "online"
    summary = train(tiny_preset(tmp_path, *ONLINE, *settings, f"output_dir={run}", "peft=null"))
    assert not (run / "index.arrow").exists() and not list(run.glob("index*"))
    first = lines(run)[0]
    # Step 1 has not moved the model yet, so that all tokens have the loss of ordinary training's first step.
    assert first["loss_all"] == pytest.approx(expected, rel=1e-5)
    if "selection.exact_layers=1" in settings:
        assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert summary.steps == ordinary.steps == 2
    assert 0 < summary.selected_share < 0.15 and summary.supervised_share == 1
    assert summary.tokens == ordinary.tokens


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, packing):
    saving = ("training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2")
    settings = (*ONLINE, *saving, f"training.packing={packing}")
    train(tiny_preset(tmp_path, *settings, examples=16))
    resumed = tmp_path / "resumed"
    train(tiny_preset(tmp_path, *settings, f"output_dir={resumed}", examples=16))
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / "summary.json").unlink()  # or it would be finished
    train(tiny_preset(tmp_path, *settings, f"output_dir={resumed}", examples=16))

    def trajectory(run):
        return [[line.get(key) for key in ("step", "loss", "loss_all", "grad_norm")] for line in lines(run)]

    assert trajectory(resumed) == trajectory(tmp_path / "run")


@pytest.mark.parametrize(
    "settings,message",
    [
        (("scoring.mode=online", "scoring.index=a.arrow"), "scoring.index is for scoring.mode: index"),
        (("scoring.mode=online", "scoring.loss_scope=sequence"), "loss_scope: sequence is for scoring.mode: index"),
        (("scoring.reduction=error", "scoring.mode=index"), "error is for scoring.mode: online"),
        (("selection.exact_layers=1",), "exact_layers needs scoring.mode: online"),
        (("selection.exact_layers=1", "scoring.mode=online"), "set selection.rule: sampled"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        tiny_preset(tmp_path, *settings)


def test_without_ditching_all_tokens_are_trained_on_whatever_would_select(tmp_path):
    """As the quickstart compares: one preset, with and without."""
    config = tiny_preset(tmp_path, *ONLINE, "selection.exact_layers=auto", "training.ditching=false")
    assert not config.needs_index
    assert train(config).selected_share == 1


def test_the_collator_leaves_the_selection_to_the_model():
    rule = SelectionRule("sampled", explore=0.3)
    features = [{"example_id": name, "input_ids": [1, 2, 3], "labels": [-100, 2, 3]} for name in "ab"]
    collator = TokenSeekCollator(None, rule=rule, online=True)
    batch = collator(features)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "selection", "selection_keys"}
    assert batch["selection"] == rule and batch["selection_keys"].shape == (2,)
    collator.set_epoch(3)
    assert ((collator(features)["selection_keys"] - batch["selection_keys"]) == 3 << 32).all()
    packed = TokenSeekCollator(None, rule=rule, online=True, packing=True)(features)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]] and packed["selection_keys"].shape == (2,)
    with pytest.raises(UserError, match="online=True scores in the training step"):
        TokenSeekCollator("index.arrow", online=True)


@pytest.mark.parametrize("asked,settled", [("auto", 1), (2, 2), (0, 0)])
def test_exact_layers_are_settled(tmp_path, caplog, asked, settled):
    config = tiny_preset(tmp_path, *ONLINE, f"selection.exact_layers={asked}")
    with caplog.at_level(logging.INFO, logger="tokenseek"):
        assert settle_exact_layers(config, PartialState(cpu=True)).selection.exact_layers == settled
    assert ("auto" in caplog.text) == (asked == "auto")


def test_gemma_4_whose_layers_share_keys_and_values(tmp_path, capsys):
    """From its folder and data alone to an adapter that loads; its top layer cannot be exact."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer)}
    model = tiny_model("gemma4", max_position_embeddings=512, **sizes)
    model.save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    write_jsonl(tmp_path / "train.jsonl", make_word_problems(12))
    settings = {"training.max_steps": 3, "training.gradient_accumulation_steps": 4, "training.report_to": []}
    settings |= {"training.logging_steps": 1, "training.learning_rate": 0.01, "data.hold_out": 4}
    run = tmp_path / "run"
    summary = finetune(tmp_path / "gemma", tmp_path / "train.jsonl", output=run, settings=settings)
    printed = capsys.readouterr().out
    assert "selection.exact_layers: auto: 0, since Gemma4ForCausalLM has layers that share keys and values" in printed
    assert "memory: not planned" not in printed and "cannot be planned" not in printed
    assert load_config(run / "config.yaml").selection.exact_layers == 0
    assert summary.steps == 3 and 0 < summary.selected_share < 0.35
    assert summary.loss_after < summary.loss_before
    first = lines(run)[1]
    assert first["loss_all"] == pytest.approx(first["loss"], rel=0.5) and first["grad_norm"] > 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma")
    trained = PeftModel.from_pretrained(base, summary.final)
    ids = torch.tensor([tokenizer("How many?")["input_ids"]])
    with torch.no_grad(), trained.disable_adapter():
        before = trained(ids).logits
    assert not torch.allclose(trained(ids).logits, before, atol=1e-3)
