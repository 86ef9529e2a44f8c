"""Every shipped preset, accelerate config and DeepSpeed config loads and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tokenseek.config import load_config
from tokenseek.config.resources import assets_root, find_resource, folder_of, list_resources, resolve_accelerate_config
from tokenseek.errors import UserError
from tokenseek.sweeps.paper import load_table

PAPER_MODELS = {
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", 1.0, 0.0),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", 1.0, 0.0),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 5.0, 5.0),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", 5.0, 5.0),
}


def test_all_presets_are_there():
    paper = {name + form for name in PAPER_MODELS for form in ("", "-loha", "-qlora")}
    assert set(list_resources("preset")) == paper | {
        "gsm8k", "here", "llama-2-7b-translation", "llama-3.1-70b-qlora", "quickstart",
    }  # fmt: skip


@pytest.mark.parametrize("name", list_resources("preset"))
def test_preset_loads_and_can_be_trained(name):
    config = load_config(name)
    config.require_trainable()
    assert config.output_dir == f"runs/{name}"


@pytest.mark.parametrize("path", sorted(folder_of("preset").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_building_block_is_used(path):
    name = str(path.relative_to(folder_of("preset")))
    includes = [yaml.safe_load(other.read_text()).get("include", []) for other in folder_of("preset").rglob("*.yaml")]
    methods = [f"methods/{row.method}.yaml" for table in list_resources("table") for row in load_table(table).rows]
    one_line = ["_base/one-line.yaml"]  # `tokenseek train` without a preset
    assert "/" not in name or any(name in included for included in [*includes, methods, one_line])


@pytest.mark.parametrize("name", PAPER_MODELS)
@pytest.mark.parametrize("form", ["", "-loha", "-qlora"])
def test_paper_settings(name, form):
    """Sections S1.2, S1.3, S1.4 and S1.7."""
    config = load_config(name + form)
    model, alpha, beta = PAPER_MODELS[name]
    assert (config.model.name_or_path, config.selection.alpha, config.selection.beta) == (model, alpha, beta)
    assert (config.model.dtype, config.training.mixed_precision) == ("bfloat16", "bf16")
    training = config.training
    assert (training.lr_scheduler_type, training.warmup_steps, training.weight_decay) == ("cosine", 100, 0.01)
    assert (training.learning_rate, training.num_train_epochs, training.optim) == (4e-4, 1, "adamw_torch")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 32)
    assert (config.selection.rule, config.selection.ratio) == ("top", 0.1)
    (source,) = config.data.sources
    assert (source.name, source.columns.response) == ("garage-bAInd/Open-Platypus", "output")
    assert source.drop == {"data_source": ["leetcode_ne", "airoboros"]}
    assert config.model.quantization == ("nf4" if form == "-qlora" else None)
    if not form:
        assert config.peft is None
    else:
        peft = config.peft
        assert (peft.r, peft.alpha, peft.dropout, peft.target_modules) == (8, 16, 0.05, "feed_forward")
        assert peft.method == {"-loha": "loha", "-qlora": "lora"}[form]


def test_gsm8k_takes_a_model_and_a_file():
    config = load_config("gsm8k", ["model.name_or_path=folder", "data.sources.0.path=file.jsonl", "data.limit=200"])
    (source,) = config.data.sources
    assert (source.path, source.columns.instruction, source.columns.response) == ("file.jsonl", "question", "answer")
    assert (config.model.name_or_path, config.model.dtype, config.peft.method) == ("folder", "float32", "lora")


def test_accelerate_configs_are_there():
    assert list_resources("accelerate config") == [
        "ddp", "ddp_cpu", "fsdp2", "multinode_ddp", "multinode_zero3", "single", "sp2", "sp2_cpu", "sp4", "sp_zero3",
        "zero1", "zero2", "zero3", "zero3_offload",
    ]  # fmt: skip
    assert list_resources("DeepSpeed config") == ["zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("name", list_resources("accelerate config"))
def test_accelerate_config_loads_and_owns_the_layout_only(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = find_resource("accelerate config", name)
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    own = yaml.safe_load(path.read_text())
    # The preset owns precision and accumulation; `deepspeed_config_file` allows none of these beside it.
    assert not {"mixed_precision", "gradient_accumulation_steps", "zero_stage"} & {
        *own,
        *own.get("deepspeed_config", {}),
    }
    engine = name.removeprefix("multinode_").removeprefix("sp_")
    if loaded.distributed_type == "DEEPSPEED":
        assert own["deepspeed_config"]["deepspeed_config_file"] == f"ds_configs/{engine}.json"
        assert (assets_root() / "ds_configs" / f"{engine}.json").is_file()


@pytest.mark.parametrize("name", list_resources("accelerate config"))
def test_accelerate_hands_sp_size_to_the_processes(name, monkeypatch):
    """Nothing but what accelerate itself makes of the file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_extend_env_parallelism_config

    from tokenseek.launching.sequence import launched_sp_size

    path = find_resource("accelerate config", name)
    words = ["--config_file", str(path), "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    expected = {"sp2": 2, "sp2_cpu": 2, "sp4": 4, "sp_zero3": 8}.get(name, 1)
    assert args.use_parallelism_config == (expected > 1)
    if args.use_parallelism_config:
        for variable, value in prepare_extend_env_parallelism_config(args, {}).items():
            monkeypatch.setenv(variable, value)
    assert launched_sp_size() == expected
    assert args.num_processes % expected == 0


@pytest.mark.parametrize("name", list_resources("DeepSpeed config"))
def test_deepspeed_config_leaves_everything_else_to_the_trainer(name):
    config = json.loads(find_resource("DeepSpeed config", name).read_text())
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("offload")
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert not {"optimizer", "scheduler"} & set(config)


def test_resources_are_found_by_name_file_name_and_path(tmp_path, monkeypatch):
    expected = assets_root() / "accelerate_configs" / "ddp.yaml"
    monkeypatch.chdir(tmp_path)
    for given in ("ddp", "ddp.yaml", "accelerate_configs/ddp.yaml", expected):
        assert find_resource("accelerate config", given) == expected
    own = tmp_path / "own.yaml"
    own.write_text("{}")
    assert find_resource("accelerate config", "own.yaml") == own.resolve()


def test_a_dot_in_a_name_is_no_suffix():
    assert find_resource("preset", "llama-3.2-1b").name == "llama-3.2-1b.yaml"


@pytest.mark.parametrize(
    ("kind", "given", "nearest"),
    [("preset", "llama-3.2-1b-qlra", "llama-3.2-1b-qlora"), ("accelerate config", "dpd_cpu", "ddp_cpu")],
)
def test_unknown_names_list_what_exists(kind, given, nearest):
    with pytest.raises(UserError, match=f"did you mean {nearest}") as error:
        find_resource(kind, given)
    assert all(name in str(error.value) for name in list_resources(kind))


def test_deepspeed_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(assets_root())
    assert resolve_accelerate_config("zero2") == assets_root() / "accelerate_configs/zero2.yaml"
    monkeypatch.chdir(tmp_path)
    assert resolve_accelerate_config("ddp") == assets_root() / "accelerate_configs/ddp.yaml"
    shipped, copied = (
        yaml.safe_load(path.read_text())
        for path in (find_resource("accelerate config", "zero2"), resolve_accelerate_config("zero2"))
    )
    assert copied["deepspeed_config"].pop("deepspeed_config_file") == str(assets_root() / "ds_configs/zero2.json")
    shipped["deepspeed_config"].pop("deepspeed_config_file")
    assert copied == shipped

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/own.json").write_text("{}")
    own = tmp_path / "elsewhere/own.yaml"
    own.write_text("deepspeed_config: {deepspeed_config_file: own.json}\n")
    resolved = yaml.safe_load(resolve_accelerate_config(own).read_text())
    assert Path(resolved["deepspeed_config"]["deepspeed_config_file"]) == (tmp_path / "elsewhere/own.json").resolve()


def test_temporary_config_is_removed_at_exit(tmp_path):
    code = (
        "from tokenseek.config.resources import resolve_accelerate_config as r\n"
        "p = r('zero2'); assert p.is_file(); print(p)"
    )
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60
    )
    assert not Path(done.stdout.strip()).exists()
