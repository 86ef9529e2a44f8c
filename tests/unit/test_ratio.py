"""`selection.ratio: auto`: the engine of a launch, the share that fits, and what a resumed run goes on with."""

import os

import pytest
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

import benchmarks.plan
from benchmarks.plan import model_config
from tokenseek.config import save_resolved
from tokenseek.config.resources import list_resources, resolve_accelerate_config
from tokenseek.errors import UserError
from tokenseek.planning import Engine, Method, launched_engine, plan_memory, read_engine
from tokenseek.runs import ratio
from tokenseek.runs.ratio import settle_ratio

TOKENS = 128
LLAMA = model_config("llama", hidden=64, layers=2, vocab=500, tokens=TOKENS)


@pytest.mark.parametrize("name", [n for n in list_resources("accelerate config") if not n.startswith("multi")])
def test_processes_know_the_engine_that_was_launched(name, monkeypatch):
    arguments = ["--config_file", str(resolve_accelerate_config(name)), "--main_process_port", "0", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if args.use_deepspeed:
        pytest.importorskip("deepspeed")
        args.deepspeed_fields_from_accelerate_config = "deepspeed_config_file"  # as launch_command would
        environment = prepare_deepspeed_cmd_env(args)[1]
    elif args.num_processes > 1:
        environment = prepare_multi_gpu_env(args)
    else:
        environment = prepare_simple_launcher_cmd_env(args)[1]
    environment["WORLD_SIZE"] = str(args.num_processes)
    for key in set(os.environ) - set(environment):
        monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    expected = read_engine(name)
    assert launched_engine(expected.on_cpu) == expected


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """A configuration with `ratio: auto`; its model is a folder with a config.json."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    LLAMA.save_pretrained(tmp_path / "model")
    settings = ("selection.ratio=auto", f"model.name_or_path={tmp_path}/model", f"output_dir={tmp_path}/run")

    def config(*more):
        return benchmarks.plan.run_config(2048, *settings, *more)

    return config


def peak(config, share):
    return plan_memory(config, Method(share), Engine(on_cpu=True), tokens=TOKENS).peak


def settle(config, checkpoint=None):
    return settle_ratio(config, checkpoint, TOKENS, PartialState(cpu=True))


def test_the_largest_share_that_fits_is_taken(auto, capsys):
    budget = peak(auto(), 0.42)
    settled = settle(auto(f"training.memory_budget='{budget}'"))
    assert settled.selection.ratio == 0.42 and settled.selection.to_rule().ratio == 0.42
    assert settled == auto("selection.ratio=0.42")
    assert "selection.ratio: auto: r = 0.42 is the largest share that fits into" in capsys.readouterr().out
    assert settle(settled) is settled


def test_without_a_budget_nine_tenths_of_the_free_memory_are_used(auto, monkeypatch):
    monkeypatch.setattr(ratio, "free_memory_bytes", lambda state: peak(auto(), 0.42) / 0.9 + 1)
    assert settle(auto()).selection.ratio == 0.42


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            ("training.recompute=auto",),
            "selection.ratio and training.recompute are both auto, and with scoring.mode: index",
        ),
        (
            ("selection.ratio=0.1", "training.recompute=auto", "training.ditching=false"),
            "recompute: auto needs ditching",
        ),
        (("selection.ratio=0.1", "training.memory_budget=1GiB"), "memory_budget is for selection.ratio: auto and"),
    ],
)
def test_settings_that_do_not_go_together(auto, settings, message):
    with pytest.raises(UserError, match=message):
        auto(*settings)


def test_where_nothing_fits_it_is_told_what_would_help(auto):
    with pytest.raises(UserError, match=r"(?s)ratio: auto: in 1.0 MiB: nothing fits; .*\n  --set peft.method=lora"):
        settle(auto("training.memory_budget=1MiB"))


def test_a_resumed_run_goes_on_with_the_share_of_its_checkpoint(auto, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(UserError, match="config.yaml, which would give the share.*holds none"):
        settle(auto(), str(run / "checkpoint-5"))
    save_resolved(auto("selection.ratio=0.37"), run / "config.yaml")
    assert settle(auto("training.memory_budget=1KiB"), str(run / "checkpoint-5")).selection.ratio == 0.37
    save_resolved(auto(), run / "config.yaml")
    with pytest.raises(UserError, match="holds none"):
        settle(auto(), str(run / "checkpoint-5"))


def test_what_needs_a_number_says_so(auto):
    with pytest.raises(UserError, match="selection.ratio is auto, which is settled when training starts"):
        auto().selection.to_rule()
