"""The public dimensions of models: what is built from them has the parameters that each vendor states."""

from __future__ import annotations

import argparse

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from tokenseek.cli import main
from tokenseek.commands import plan
from tokenseek.config import load_config
from tokenseek.config.resources import list_resources
from tokenseek.errors import UserError
from tokenseek.planning import describe_length
from tokenseek.planning.shapes import find_shape, known_shape, known_shapes
from tokenseek.planning.step import load_model_config


@pytest.mark.parametrize("shape", known_shapes(), ids=lambda shape: shape.short)
def test_the_model_has_the_parameters_that_its_vendor_states(shape):
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(shape.config())
        model.tie_weights()
    count = model.num_parameters()
    if isinstance(shape.parameters, int):
        assert count == shape.parameters
    else:  # to the digits that are stated
        digits = len(shape.parameters.rstrip("B").partition(".")[2])
        assert f"{count / 1e9:.{digits}f}B" == shape.parameters


def test_there_are_many_and_every_name_is_one_model():
    assert len(known_shapes()) >= 40
    by_short = {}
    for shape in known_shapes():
        for name in (shape.name, *shape.also):
            assert by_short.setdefault(name.rpartition("/")[2].lower(), shape) is shape


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "llama-3.1-8b", "LLAMA-3.1-8B-Instruct"])
def test_a_model_is_found_by_any_of_its_names(name):
    assert find_shape(name).name == "meta-llama/Llama-3.1-8B"


def test_an_unknown_shape_names_the_nearest():
    with pytest.raises(UserError, match=r"--shape llama-3.1-9b: no such model; nearest are llama-3.1-8b.*config.json"):
        find_shape("llama-3.1-9b")


# Three presets are made for folders of the user's own.
@pytest.mark.parametrize("preset", sorted({*list_resources("preset")} - {"gsm8k", "here", "quickstart"}))
def test_every_shipped_preset_is_planned_without_a_hub(preset):
    config = load_config(preset)
    assert known_shape(config.model.name_or_path), f"{config.model.name_or_path} is not in shapes.yaml"
    assert load_model_config(config).num_hidden_layers


def test_the_command_takes_a_shape_with_and_without_a_preset(capsys):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    alone = plan.check(parser.parse_args(["--shape", "smollm2-135m", "--set", "data.max_length=9000"]))
    assert (alone.model.name_or_path, alone.data.max_length) == ("HuggingFaceTB/SmolLM2-135M", 9000)
    changed = plan.check(parser.parse_args(["--preset", "llama-2-7b-qlora", "--shape", "Llama-3.1-8B"]))
    assert changed.model.name_or_path == "meta-llama/Llama-3.1-8B" and changed.model.quantization == "nf4"
    assert main(["plan", "--shape", "smollm2-136m"]) == 2
    assert "--shape smollm2-136m: no such model; nearest are smollm2-" in capsys.readouterr().err


def test_lengths_beyond_the_positions_are_told_with_the_scaling_that_would_allow_them():
    config = find_shape("smollm2-135m").config()
    assert describe_length(config, 8192) is None
    assert "9,000 tokens are more than the 8,192 positions" in (told := describe_length(config, 9000))
    assert '"factor": 2.0' in told


def test_learned_positions_cannot_be_extended():
    with pytest.raises(UserError, match="2,000 tokens: the model has 1,024 positions and learned each"):
        describe_length(AutoConfig.for_model("gpt2"), 2000)
    assert describe_length(AutoConfig.for_model("gpt2"), 1024) is None


def test_a_plan_takes_the_words_of_training_and_needs_no_data(tmp_path, capsys):
    find_shape("smollm2-135m").config().save_pretrained(tmp_path / "model")
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)

    def checked(*words):
        return plan.check(parser.parse_args(list(words)))

    config = checked("--model", str(tmp_path / "model"))
    assert config.peft.method == "lora" and config.scoring.mode == "online"
    assert config.data.max_length == 2048
    assert checked("--model", "llama-3.1-8b", "--method", "qlora").model.quantization == "nf4"  # asks no hub
    assert checked("--shape", "llama-3.1-8b", "--method", "full").peft is None
    config = checked("--preset", "gsm8k", "--method", "lora", f"--model={tmp_path / 'model'}")
    assert config.data.max_length == 512 and config.peft.method == "lora"
    assert checked(f"--set=model.name_or_path={tmp_path / 'model'}").peft is None
    for words, message in (
        ([], "a plan needs a model: --model"),
        (["--method", "lora"], "--model is missing"),
        (["--model", "gpt2", "--data", "no.jsonl"], "there is no file or folder no.jsonl"),
        (["--model", "gpt2", "--shape", "smollm2-135m"], "give one of them"),
    ):
        assert main(["plan", *words]) == 2
        assert message in capsys.readouterr().err
