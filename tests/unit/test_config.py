"""Configurations: composition, overrides, and an error with the dotted path for every mistake."""

import subprocess
import sys

import pytest

from tokenseek.config import DataConfig, RunConfig, load_config, save_resolved
from tokenseek.config.loading import override_config
from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError
from tokenseek.selection import SelectionRule

MINIMAL = ["model.name_or_path=m", "data.sources.0.path=d.jsonl", "output_dir=out"]


def refusal(*overrides: str, preset=None) -> str:
    with pytest.raises(UserError) as error:
        load_config(preset, [*MINIMAL, *overrides])
    return str(error.value)


def test_minimal_config_has_the_documented_defaults():
    config = load_config(None, MINIMAL)
    assert config.training.per_device_train_batch_size == 1
    assert config.training.report_to == ["tensorboard"]
    assert (config.scoring.gradient_layer, config.scoring.reduction) == (1, "abs")
    assert (config.selection.rule, config.selection.ratio, config.selection.explore) == ("sampled", 0.3, 0.3)
    assert (config.selection.scope, config.selection.exact_layers) == ("supervised", "auto")
    assert config.scoring.mode == "online"
    assert (config.data.template, config.data.labels, config.data.append_eos) == ("alpaca", "response", True)
    assert config.model.trust_remote_code is False
    assert config.peft is None and config.eval_data is None


def test_another_rule_brings_its_own_defaults_but_for_what_was_said():
    said = load_config(None, [*MINIMAL, "selection.ratio=0.2", "selection.exact_layers=auto"])
    top = override_config(said, {"selection.rule": "top"})
    assert top.selection.to_rule() == SelectionRule("top", ratio=0.2) and top.selection.exact_layers == 0
    assert (top.scoring.mode, said.scoring.mode) == ("index", "online")
    assert override_config(top, {"selection.rule": "sampled"}) == said
    assert override_config(said, {"scoring.mode": "index"}).selection.exact_layers == 0
    with pytest.raises(UserError, match="selection.explore is 0.5; accepted is 0 for 'top'"):
        override_config(said, {"selection.rule": "top", "selection.explore": 0.5})


def test_a_saved_run_keeps_what_it_had(tmp_path):
    config = load_config(None, MINIMAL)
    save_resolved(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "mode: online" in (tmp_path / "config.yaml").read_text()


def test_configurations_are_checked_without_heavy_imports():
    code = (
        "import sys; "
        "from tokenseek.config import load_config; load_config('llama-3.2-1b-qlora'); "
        "assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.learning_rte=1",
            ["training.learning_rte: unknown key", "weight_decay", "did you mean learning_rate?"],
        ),
        ("max_steps=1", ["max_steps: unknown key", "did you mean training.max_steps?"]),
        ("selection.max_steps=1", ["selection.max_steps: unknown key", "did you mean training.max_steps?"]),
        ("data.path=x", ["data.path: unknown key", "did you mean data.sources.0.path?"]),
        ("path=x", ["path: unknown key", "did you mean data.sources.0.path or eval_data.sources.0.path?"]),
        ("trainin.max_steps=1", ["trainin: unknown key", "did you mean training?"]),
        ("data.sources.0.colums.text=t", ["data.sources.0.colums: unknown key", "did you mean columns?"]),
        ("data.sources.0.columns.txt=t", ["data.sources.0.columns.txt: unknown key", "did you mean text?"]),
        (
            "model.dtype=bfloat",
            ["model.dtype: should be 'bfloat16', 'float16' or 'float32', got 'bfloat'", "bfloat16?"],
        ),
        ("training.max_steps=ten", ["training.max_steps: should be a valid integer, got 'ten'"]),
        ("training.max_steps='10'", ["training.max_steps: should be a valid integer, got '10'"]),
        ("training.warmup_steps=true", ["training.warmup_steps: should be a valid number, got True"]),
        ("training.learning_rate=-1", ["training.learning_rate: should be greater than or equal to 0, got -1"]),
        ("training=5", ["training: ", "got 5"]),
        ("selection.ratio=1.5", ["selection.ratio", "1.5", "(0, 1]"]),
        ("selection.ratio=0", ["selection.ratio", "(0, 1]"]),
        ("selection.rule=tpo", ["selection.rule", "'tpo'", "top_random"]),
        ("selection.bands=[[0, 0.1], [0.4]]", ["selection.bands"]),
        ("scoring.gradient_layer=4", ["scoring.gradient_layer: should be 1, 2 or 3, got 4"]),
        ("data.sources=[]", ["data.sources: ", "at least 1 item"]),
        ("data.sources.0.name=hub/set", ["data.sources.0: give either path", "'d.jsonl'", "'hub/set'"]),
        ("data.sources.0.kind=chats", ["data.sources.0.kind", "did you mean chat?"]),
        ("data.sources.0.columns.text=t", ["data.sources.0: columns ['text'] are not read by kind instruction"]),
        ("data.sources.0={path: a, rows: 2, weight: 1}", ["data.sources.0: give either weight or rows"]),
        ("data.sources=[{path: a, weight: 1}, {path: b}]", ["data: one source has a weight"]),
        ("data.sources.0.drop={a: [{}]}", ["data.sources.0.drop.a.0: "]),
        ("data.max_length=1", ["data.max_length: should be greater than or equal to 2"]),
        ("model.double_quantization=true", ["model: double_quantization needs quantization: nf4 or fp4"]),
        ("peft.target_modules=mlp", ["peft.target_modules: accepted are feed_forward, attention, all-linear"]),
        ("peft.target_modules=[]", ["peft.target_modules: accepted are", "got []"]),
        ("peft.method=lra", ["peft.method: unknown PEFT method 'lra'; did you mean lora?"]),
        ("training.extra.max_steps=1", ["training.extra: max_steps is set as training.max_steps"]),
        ("training.extra.bf16=true", ["training.extra: bf16 is set as training.mixed_precision"]),
        ("training.extra.adam_beta=1", ["training.extra: adam_beta is not a field", "did you mean adam_beta"]),
        ("selection.ratio=atuo", ["selection.ratio: ", "valid number", "'auto'", "did you mean auto?"]),
        ("selection={ratio: auto, rule: all}", ["selection.ratio is auto, but rule 'all' takes no ratio"]),
        ("selection={ratio: auto, explore: 2}", ["selection.explore is 2"]),
        ("training.memory_budget=8GiB", ["training.memory_budget is for selection.ratio: auto"]),
        (
            "training.memory_budget=8 elephants",
            ["training.memory_budget: '8 elephants' is not a valid size; write 8GiB"],
        ),
        ("training={packing: true, ditching: false}", ["training: packing: true needs ditching: true"]),
        ("training.eval_strategy=steps", ["training.eval_strategy is steps, but there is no eval_data section"]),
    ],
)
def test_violations_name_the_path_and_what_is_accepted(override, expected):
    message = refusal(override)
    assert "1 problem(s)" in message
    for text in expected:
        assert text in message


def test_violations_are_collected():
    message = refusal("model.dtype=x", "training.oops=1", "selection.ratio=2", "scoring.reduction=sum")
    assert "4 problem(s)" in message
    for path in ("model.dtype", "training.oops", "selection.ratio", "scoring.reduction"):
        assert f"\n  {path}" in message


def test_missing_sections_are_named():
    with pytest.raises(UserError, match="2 problem.*\n  model: required.*\n  output_dir: required"):
        load_config(None, ["data.sources.0.path=d"])


def test_extra_forwards_fields_of_training_arguments():
    config = load_config(None, [*MINIMAL, "training.extra={adam_beta2: 0.95}"])
    assert config.training.extra == {"adam_beta2": 0.95}


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "ia3", "boft", "oft"])
def test_any_peft_method_is_accepted(method):
    assert load_config(None, [*MINIMAL, f"peft.method={method}"]).peft.method == method


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training", "write section.key=value"),
        ("a..b=1", "write section.key=value"),
        ("=1", "write section.key=value"),
        ("data.sources.3.path=x", "positions 0 to 1, got '3'"),
        ("data.sources.first.path=x", "positions 0 to 1, got 'first'"),
        ("output_dir.x=1", "output_dir is the value 'out' and has no keys"),
        ("training={optim: a, optim: b}", "optim: duplicate key"),
        ("training=[1", "not valid YAML"),
    ],
)
def test_malformed_overrides(override, expected):
    assert expected in refusal(override)


def test_overrides_reach_lists_and_later_ones_win():
    config = load_config(
        None,
        [
            *MINIMAL,
            "data.sources.0.path=a.jsonl",
            "data.sources.1.path=b=c.jsonl",
            "data.sources.1.rows=5",
            "data.sources.1.drop.kind=[x, null, 3]",
            "selection.rule=bands",
            "selection.bands=[[0, 0.1], [0.4, 0.5]]",
            "training.learning_rate=1e-4",
            "training.save_strategy=no",
            "training.report_to=[]",
            "scoring.index=there.arrow",
        ],
    )
    first, second = config.data.sources
    assert (first.path, second.path, second.rows) == ("a.jsonl", "b=c.jsonl", 5)
    assert second.drop == {"kind": ["x", None, 3]}
    assert config.selection.to_rule().bands == ((0.0, 0.1), (0.4, 0.5))
    assert config.training.learning_rate == 1e-4
    assert config.training.save_strategy == "no"  # YAML 1.1 would make it False
    assert str(config.index_path) == "there.arrow"


def test_presets_compose_and_the_later_file_wins(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {name_or_path: base, dtype: float32}\noutput_dir: base\n")
    (tmp_path / "data.yaml").write_text("data: {sources: [{path: a}, {path: b}], max_length: 9}\noutput_dir: data\n")
    (tmp_path / "run.yaml").write_text(
        "include: [base.yaml, data.yaml]\nmodel: {name_or_path: own}\ndata: {sources: [{path: c}]}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert (config.model.name_or_path, config.model.dtype, config.output_dir) == ("own", "float32", "data")
    assert ([source.path for source in config.data.sources], config.data.max_length) == (["c"], 9)


def test_an_override_of_an_aliased_section_leaves_the_other_alone(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "model: {name_or_path: m}\ndata: &data {sources: [{path: a.jsonl}]}\neval_data: *data\noutput_dir: o\n"
    )
    config = load_config(preset, ["eval_data.sources.0.path=b.jsonl"])
    assert [section.sources[0].path for section in (config.data, config.eval_data)] == ["a.jsonl", "b.jsonl"]


def test_a_users_preset_can_include_shipped_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("include: [llama-3.2-1b-loha.yaml]\noutput_dir: mine\n")
    assert load_config(tmp_path / "mine.yaml").peft.method == "loha"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training:\n  optim: a\n  weight_decay: 0\n  optim: b\n",
            "line 4: training.optim: duplicate key, first given on line 2",
        ),
        ("data:\n  sources:\n    - path: a\n      path: b\n", "line 4: data.sources.0.path: duplicate key"),
        ("- a\n", "a preset is a mapping of sections, got a list"),
        ("model: [\n", "not valid YAML"),
        ("include: missing.yaml\n", "a list of file names"),
        ("include: [missing.yaml]\n", "no file 'missing.yaml'"),
        ("include: [run.yaml]\n", "include each other"),
    ],
)
def test_bad_preset_files_name_the_file(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert expected in str(error.value)
    assert "run.yaml" in str(error.value)


def test_resolved_config_reads_back_unchanged(tmp_path):
    config = load_config("llama-3.2-3b-qlora", ["training.save_strategy=no", "data.sources.0.drop.n=[null, 1, on]"])
    save_resolved(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_require_trainable():
    load_config(None, MINIMAL).require_trainable()
    load_config(None, [*MINIMAL, "model.quantization=nf4", "peft.method=lora"]).require_trainable()
    with pytest.raises(UserError, match="model.quantization: nf4 weights cannot be trained"):
        load_config(None, [*MINIMAL, "model.quantization=nf4"]).require_trainable()
    with pytest.raises(UserError, match="float16 weights"):
        load_config(None, [*MINIMAL, "model.dtype=float16", "training.mixed_precision=fp16"]).require_trainable()


def test_schedulers_are_those_of_transformers():
    from transformers import SchedulerType

    from tokenseek.config import TrainingConfig

    accepted = TrainingConfig.model_fields["lr_scheduler_type"].annotation.__args__
    assert set(accepted) <= {member.value for member in SchedulerType}


def test_training_fields_are_those_of_training_arguments():
    from dataclasses import fields

    from transformers import TrainingArguments

    from tokenseek.config import DitchingSettings, TrainingConfig

    assert set(TrainingConfig.model_fields) - set(DitchingSettings.model_fields) <= {
        field.name for field in fields(TrainingArguments)
    }


def test_sections_validate_on_their_own():
    assert DataConfig.model_validate({"sources": [{"path": "a"}]}).sources[0].columns.input is None
    assert set(RunConfig.model_fields) >= {"model", "data", "scoring", "selection", "training", "peft"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("true", True), ("null", None), ("", None), ("12", 12), ("'3'", "3"), ("e5", "e5"),
        ("4e-4", 4e-4), ("1.", 1.0), ("-.5", -0.5), ("1e3", 1000.0), (".inf", float("inf")), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_plain_scalars(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)
