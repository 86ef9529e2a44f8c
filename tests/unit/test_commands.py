"""The commands: one file each, whose flags are written once and reach the launched processes as they were given."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenseek import cli
from tokenseek.config.resources import list_resources
from tokenseek.launching import launcher

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = [name for name, command in cli.COMMANDS.items() if command.LAUNCHED]
WORDS = {
    "score": ["--preset", "gsm8k", "--set", "data.max_length=99", "--part=1/3"],
    "train": ["--set", "selection.ratio=0.2", "--preset", "gsm8k", "--set=seed=3"],
    "tune": ["--preset", "gsm8k", "--weights", "1,0", "--weights=0,1", "--ratios", "0.1,0.2", "--hold-out", "7"],
    "reproduce": ["1", "--preset", "gsm8k", "--rows", "qlora", "--steps=3"],
    "evaluate": ["some/model", "--tasks", "held_out_loss", "--set", "eval_data.sources.0.path=x", "--limit=4"],
}


@pytest.fixture
def launched(monkeypatch):
    """The words of `accelerate launch`, which is not run."""
    found = []
    monkeypatch.setattr(launcher, "accelerate_launch", lambda words: found.extend(words) or 7)
    return found


def test_every_launched_command_is_tested():
    assert set(WORDS) == set(LAUNCHED)


@pytest.mark.parametrize("name", LAUNCHED)
def test_words_are_handed_on_as_they_are(name, launched, monkeypatch):
    monkeypatch.setattr(cli.COMMANDS[name], "check", lambda args: None)
    words = WORDS[name]
    assert cli.main([name, "--accelerate-config=zero2", *words, "--num-processes", "3"]) == 7
    configs, script = ROOT / "accelerate_configs", ROOT / "launch" / f"{name}.py"
    if launched[1] != str(configs / "zero2.yaml"):  # a copy that names the DeepSpeed config by its whole path
        assert Path(launched[1]).name == "zero2.yaml"
    assert [launched[0], *launched[2:]] == ["--config_file", "--num_processes", "3", str(script), *words]


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_script_parses_and_checks_what_the_command_does(name, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.COMMANDS[name], "check", lambda args: seen.append(args) or "checked")
    monkeypatch.setattr(cli.COMMANDS[name], "run", lambda args, checked: seen.append(checked))
    monkeypatch.setattr(launcher, "accelerate_launch", lambda _: 0)
    assert cli.main([name, *WORDS[name]]) == 0
    monkeypatch.setattr(sys, "argv", [f"launch/{name}.py", *WORDS[name]])
    assert cli.run_script(name) == 0
    typed, script, checked = seen
    assert checked == "checked"
    only_typed = {"command", "accelerate_config", "num_processes"} | ({"here"} - vars(script).keys())
    assert {key: value for key, value in vars(typed).items() if key not in only_typed} == vars(script)


@pytest.mark.parametrize("name", LAUNCHED)
def test_scripts_do_not_accept_what_chooses_their_processes(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"launch/{name}.py", *WORDS[name], "--num-processes", "2"])
    with pytest.raises(SystemExit):
        cli.run_script(name)
    assert "unrecognized arguments: --num-processes 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--outptu", "runs/x"], "unrecognized arguments: --outptu runs/x; did you mean --output?"),
        (["train", "--ration=0.2"], "unrecognized arguments: --ration=0.2; did you mean --ratio?"),
        (["train", "--nothing-like-it"], "unrecognized arguments: --nothing-like-it\n"),
        (["merge-adapter", "a", "b", "c"], "unrecognized arguments: c\n"),
    ],
)
def test_an_unknown_option_is_told_with_the_usage_of_its_command(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"usage: tokenseek {words[0]} [-h]") and message in told


def test_every_preset_is_listed_with_what_it_is(capsys):
    names = list_resources("preset")
    assert cli.main(["presets", "--names"]) == 0
    assert capsys.readouterr().out.split() == names
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)  # fails where a preset has no comment
    assert list(told) == names and len(set(told.values())) == len(names) and max(map(len, lines)) < 140
    assert told["gsm8k"].startswith("Grade-school word problems") and "--set" not in told["gsm8k"]


@pytest.mark.parametrize("name", ["score", "train"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_missing_column_is_told_before_processes_start(name, suffix, launched, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"question": "1 + 1?", "answer": "2"}
    text = {"jsonl": json.dumps(row), "json": f"[{json.dumps(row)}]", "csv": "question,answer\n1 + 1?,2\n"}[suffix]
    data = tmp_path / f"data.{suffix}"
    data.write_text(text)
    words = [name, "--preset", "gsm8k", f"--set=data.sources.0.path={data}", f"--set=output_dir={tmp_path / 'run'}"]
    assert cli.main([*words, "--set", "data.sources.0.columns.response=solution"]) == 2
    told = capsys.readouterr().err
    assert "data.sources.0.columns.response: the data has no column 'solution'; did you mean answer?" in told
    assert not launched and not (tmp_path / "run").exists()
    assert cli.main(words) == 7 and launched


def test_a_column_that_later_rows_have_is_accepted(launched, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?"}\n{"question": "1 + 2?", "answer": "3"}\n')
    assert cli.main(["train", "--preset", "gsm8k", "--set", f"data.sources.0.path={data}"]) == 7 and launched


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_no_number_of_processes(count, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "gsm8k", "--num-processes", count])
    assert f"'{count}' is not a whole number above 0" in capsys.readouterr().err


def test_a_list_of_rows_launches_nothing(launched, capsys):
    assert cli.main(["reproduce", "S13", "--preset", "gsm8k", "--list"]) == 0
    assert launched == [] and ":" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_groups_its_options(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    if "--preset" in text:
        assert "\nconfiguration:\n" in text
    if name in LAUNCHED:
        assert "\nprocesses:\n  --accelerate-config" in text
    options = text.partition("\noptions:\n")[2].partition("\n\n")[0].split("\n")
    assert [line.split()[0] for line in options if line.startswith("  -")] in (["-h,"], ["-h,", "--base", "--dtype"])


def test_help_does_not_wait_for_torch():
    code = "import sys, tokenseek.cli; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "[]\n", run
