"""A run told in one line: the configuration that is made of the words, mistakes before anything starts, and a run."""

import json
import re
from pathlib import Path

import pytest
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model

import tokenseek
from tokenseek import UserError, cli
from tokenseek.config import ModelConfig, OneLine, list_methods, load_config, load_one_line
from tokenseek.data.toy import make_word_problems
from tokenseek.models.files import model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-line")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    write_jsonl(folder / "problems.jsonl", make_word_problems(12))
    return folder


@pytest.fixture
def words(folder, monkeypatch):
    """Makes the words for the folder's model and data, from inside it."""
    monkeypatch.chdir(folder)
    return lambda **others: OneLine(**({"model": "tiny", "data": "problems.jsonl"} | others))


def test_two_words_are_enough(words):
    config = load_one_line(words())
    default = load_config(None, ["model.name_or_path=m", "data.sources.0.path=d", "output_dir=o"])
    assert config.selection == default.selection.model_copy(update={"ratio": "auto"})
    assert config.scoring == default.scoring
    assert config.peft and config.peft.method == "lora" and config.model.quantization is None
    assert (config.output_dir, config.training.learning_rate) == ("runs/tiny-problems", 2e-4)
    assert (config.model.dtype, config.training.mixed_precision) == ("float32", "no")
    data = config.data
    assert (data.sources[0].path, data.sources[0].kind, data.template) == ("problems.jsonl", "auto", "auto")
    assert (data.max_length, data.rewritten_turns) == (512, "separate")  # the model has 512 positions
    batch = config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps
    assert batch == (1, 16) and config.training.recompute == "auto"


def test_every_method_of_the_folder_is_a_word(words):
    page = (Path(__file__).resolve().parents[2] / "docs" / "one-line.md").read_text(encoding="utf-8")
    named = re.search(r"^\| `--method` \| (.*?) \|", page, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", named[1])) == list_methods()
    for method in list_methods():
        config = load_one_line(words(method=method))
        assert (config.peft is None) == (method == "full")
        assert config.training.learning_rate == (2e-5 if method == "full" else 2e-4)
        assert (config.model.quantization == "nf4") == (method == "qlora")


@pytest.mark.parametrize("method,dtype", [("lora", "bfloat16"), ("qlora", "bfloat16"), ("full", "float32")])
def test_numbers_on_a_gpu(words, method, dtype):
    config = load_one_line(words(method=method), on_cpu=lambda: False)
    assert (config.model.dtype, config.training.mixed_precision) == (dtype, "bf16")
    batch = config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps
    assert batch == ("auto", 16)
    said = load_one_line(
        words(method=method), None, ["training.per_device_train_batch_size=2"], None, on_cpu=lambda: False
    )
    assert said.training.micro_batch == 2


def test_settings_win_over_words_and_defaults(words):
    overrides = ["model.dtype=bfloat16", "data.max_length=64", "output_dir=elsewhere", "selection.ratio=0.5"]
    config = load_one_line(words(ratio=0.3), None, overrides, {"training.learning_rate": 1e-3})
    assert (config.model.dtype, config.data.max_length, config.output_dir) == ("bfloat16", 64, "elsewhere")
    assert (config.selection.ratio, config.training.learning_rate) == (0.5, 1e-3)
    assert load_one_line(words(ratio=0.3, output="here")).output_dir == "here"
    assert load_one_line(words(ratio=0.3)).selection.ratio == 0.3


@pytest.mark.parametrize(
    "overrides,ratio,recompute",
    [
        (["training.ditching=false"], 0.3, False),
        (["scoring.mode=index"], 0.3, "auto"),
        (["selection.rule=all"], 0.1, "auto"),
        (["selection={rule: all}"], 0.1, "auto"),
        (["training.recompute=true", "training.per_device_train_batch_size=2"], "auto", True),
        (["training={learning_rate: 1e-3}"], "auto", "auto"),
    ],
)
def test_what_the_planner_chooses_is_what_nobody_set(words, overrides, ratio, recompute):
    config = load_one_line(words(), None, overrides)
    assert (config.selection.ratio, config.training.recompute) == (ratio, recompute)


@pytest.mark.parametrize(
    "overrides, mode, explore, exact_layers",
    [
        ([], "online", 0.3, "auto"),
        (["selection.rule=all"], "index", 0, 0),
        (["selection.rule=random"], "index", 0, 0),
        (["selection.rule=top"], "index", 0, 0),
        (["selection.rule=top", "scoring.mode=online"], "online", 0, 0),
        (["selection.alpha=5"], "online", 0.3, 0),
        (["scoring.reduction=error"], "online", 0.3, 0),
        (["scoring.mode=index"], "index", 0.3, 0),
        (["scoring.index=scores.arrow"], "index", 0.3, 0),
        (["scoring.loss_scope=sequence"], "index", 0.3, 0),
        (["selection.rule=random", "scoring.mode=online"], "online", 0, 0),
    ],
)
def test_another_rule_takes_what_it_reads(words, overrides, mode, explore, exact_layers):
    config = load_one_line(words(), None, overrides)
    assert config.selection.scope == ("supervised" if config.selection.rule == "sampled" else "all")
    assert config.scoring.mode == mode
    assert (config.selection.explore, config.selection.exact_layers) == (explore, exact_layers)


@pytest.mark.parametrize(
    "ratio, overrides, message",
    [
        (0.3, ["selection.rule=all"], "selection.rule: all takes no ratio, got 0.3; leave out --ratio, or the rule"),
        (None, ["selection.rule=top", "selection.explore=0.3"], "selection.explore is 0.3; accepted is 0 for 'top'"),
        (None, ["selection={rule: all, explore: 0.3}"], "selection.explore is 0.3; accepted is 0 for 'all'"),
        (None, ["scoring.mode=index", "selection.exact_layers=1"], "selection.exact_layers needs scoring.mode: online"),
        (None, ["selection.rule=tops"], "selection.rule.*tops"),
    ],
)
def test_what_a_rule_does_not_take_is_refused_where_it_was_said(words, ratio, overrides, message):
    with pytest.raises(UserError, match=message):
        load_one_line(words(ratio=ratio), None, overrides)


def test_auto_that_was_said_is_refused_where_it_has_no_meaning(words):
    with pytest.raises(UserError, match="selection.ratio is auto and training.ditching false"):
        load_one_line(words(), None, ["training.ditching=false", "selection.ratio=auto"])


def test_words_replace_what_a_preset_says_and_nothing_else(words):
    preset = load_config("llama-3.2-1b-qlora")
    config = load_one_line(OneLine(data="problems.jsonl", method="ia3"), "llama-3.2-1b-qlora")
    assert config.peft.model_dump() == {**preset.peft.model_dump(), "method": "ia3", "r": None, "alpha": None} | {
        "dropout": None
    }
    assert config.model.quantization is None and config.model.name_or_path == preset.model.name_or_path
    assert [source.path for source in config.data.sources] == ["problems.jsonl"]
    assert (config.training, config.selection) == (preset.training, preset.selection)
    assert config.output_dir == "runs/Llama-3.2-1B-problems"  # not the folder of the preset's own run
    shared = load_one_line(OneLine(data="problems.jsonl", ratio=0.2), "llama-3.2-1b-qlora")
    assert (shared.peft, shared.selection.ratio) == (preset.peft, 0.2)
    only_ratio = load_one_line(OneLine(ratio=0.2), "llama-3.2-1b-qlora")
    assert only_ratio.output_dir == preset.output_dir


@pytest.mark.parametrize(
    "model,data,output",
    [
        ("tiny/", "./problems.jsonl", "runs/tiny-problems"),
        ("./tiny", ".", "runs/tiny-{folder}"),
        ("tiny", "org/some data", "runs/tiny-some-data"),
    ],
)
def test_the_folder_is_named_after_both(words, folder, model, data, output):
    assert load_one_line(words(model=model, data=data)).output_dir == output.format(folder=folder.name)


@pytest.mark.parametrize(
    "config,length",
    [
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 128}, "max_position_embeddings": 999}, 128),
        ({"max_position_embeddings": 131072}, 2048),
        ({}, 2048),
    ],
)
def test_no_text_is_longer_than_the_model_takes(words, tmp_path, config, length):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_one_line(words(model=str(tmp_path))).data.max_length == length


@pytest.mark.parametrize(
    "others,message",
    [
        (["--model", "tiny"], "--data is missing"),
        (["--method", "lora"], "--model and --data is missing"),
        (["--model", "tiny", "--data", "problems.jsonl", "--method", "qlorra"], "did you mean qlora?"),
        (
            ["--model", "tiny", "--data", "problem.jsonl"],
            "there is no file or folder problem.jsonl; did you mean problems",
        ),
        (["--model", "./teeny", "--data", "problems.jsonl"], "there is no folder teeny"),
        (["--model", ".", "--data", "problems.jsonl"], "holds no config.json"),
        (["--model", "tiny", "--data", "problems.jsonl", "--set", "training.max_step=2"], "did you mean max_steps?"),
        (["--model", "tiny", "--data", "problems.jsonl", "--set", "model=3"], "model"),
        (["--preset", "gsm8k", "--data", "nowhere.jsonl"], "no file or folder nowhere.jsonl"),
    ],
)
def test_mistakes_are_told_before_any_process_starts(words, monkeypatch, capsys, others, message):
    monkeypatch.setattr(cli, "launch_script", lambda *args: pytest.fail("processes were started"))
    assert cli.main(["train", *others]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_model_is_told_by_what_it_is(words, tmp_path):
    adapter = {"base_model_name_or_path": "org/base"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.GGUF").touch()
    (tmp_path / "gguf/model.gguf").touch()
    expected = {
        "adapter": "holds an adapter of org/base and no model. Merge both with `tokenseek merge-adapter",
        "gguf": "is in GGUF, which is for running models",
        "gguf/model.gguf": "is in GGUF, which is for running models",
    }
    for name, message in expected.items():
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_one_line(words(model=path))
        with pytest.raises(UserError, match=message):
            model_folder(ModelConfig(name_or_path=path))


def test_qlora_needs_its_library(words, monkeypatch):
    monkeypatch.setattr("tokenseek.config.one_line.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes, which is not installed"):
        load_one_line(words(method="qlora"))
    assert load_one_line(words(method="lora")).peft


@pytest.mark.parametrize("ratio", ["0", "1.5", "-1", "half", "nan"])
def test_shares_are_shares(words, capsys, ratio):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--model", "tiny", "--data", "problems.jsonl", f"--ratio={ratio}"])
    assert "is not a share in (0, 1]" in capsys.readouterr().err


def test_processes_get_the_words_as_they_are(words, monkeypatch):
    launched = []
    monkeypatch.setattr(cli, "launch_script", lambda *args: launched.append(args) or 0)
    said = ["--model", "tiny", "--data", "problems.jsonl", "--ratio", "0.2", "--set", "training.max_steps=1"]
    assert cli.main(["train", *said, "--num-processes", "2", "--accelerate-config", "ddp_cpu"]) == 0
    assert launched == [("train", said, "ddp_cpu", 2)]


def test_a_run_prints_what_it_will_do_and_does_it(words, folder, tmp_path, capsys):
    settings = {"training.max_steps": 2, "training.gradient_accumulation_steps": 2, "training.report_to": []}
    summary = tokenseek.finetune("tiny", "problems.jsonl", output=tmp_path / "run", ratio=0.2, settings=settings)
    printed = capsys.readouterr().out
    assert "problems.jsonl: 12 rows, instruction" in printed
    assert "template: the tokenizer's chat template; loss on" in printed
    assert "first example, tokens with a loss in [[ ]]:" in printed and "[[" in printed.partition("]]:\n")[2]
    told = re.search(r"trains: lora adapters, ([\d,]+) of ([\d,]+) parameters", printed)
    assert int(told[1].replace(",", "")) == summary.trainable_parameters < int(told[2].replace(",", ""))
    assert re.search(r"memory: [\d.]+ MiB planned at the peak of a step .* [\d.]+ GiB are free\n", printed)
    assert re.search(r"^auto: training.recompute=false. [\d.]+ MiB planned at the peak", printed, re.MULTILINE)
    assert f"writes to: {tmp_path / 'run'}" in printed
    assert printed.index("writes to") < printed.index("Selection in each step")
    assert summary.steps == 2 and (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert (saved.selection.ratio, saved.selection.exact_layers, saved.scoring.mode) == (0.2, 1, "online")


def test_a_model_of_the_home_folder_is_planned(words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder))
    settings = {"training.max_steps": 1, "training.report_to": []}
    tokenseek.finetune("~/tiny", "~/problems.jsonl", output=tmp_path / "run", settings=settings)
    assert re.search(r"selection.ratio=0.3\. [\d.]+ MiB planned at the peak", capsys.readouterr().out)


def test_a_model_that_cannot_be_planned_is_trained(words, tmp_path, capsys, monkeypatch):
    def unplanned(*args, **options):
        raise UserError("its sizes depend on the data.\nand more")

    monkeypatch.setattr("tokenseek.runs.outline.plan_memory", unplanned)
    monkeypatch.setattr("tokenseek.runs.fit.plan_memory", unplanned)
    settings = {"training.max_steps": 1, "training.gradient_accumulation_steps": 1, "training.report_to": []}
    tokenseek.finetune("tiny", "problems.jsonl", method="full", output=tmp_path / "run", settings=settings)
    printed = capsys.readouterr().out
    assert "selection.ratio=0.3. The memory of a step cannot be planned (its sizes depend on the data.).\n" in printed
    assert "memory: not planned (its sizes depend on the data.)\n" in printed
    assert re.search(r"trains: all weights, ([\d,]+) of \1 parameters \(100.00%\)", printed)
