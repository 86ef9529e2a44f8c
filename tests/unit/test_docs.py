"""The documentation does not rot: its Python blocks run in order, its commands parse, its links lead somewhere."""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model
from tiny_run import write_index

import tokenseek
import tokenseek.cli
from tokenseek.config.resources import resolve_accelerate_config
from tokenseek.data.toy import make_word_problems
from tokenseek.errors import UserError
from tokenseek.evaluation.benchmarks import split_tasks
from tokenseek.runs.inputs import run_fingerprints

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its info string (`python no-run`, `bash`, ...), the line it begins on, its text."""

    kind: str
    line: int
    text: str


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [Block(m[1].strip(), text[: m.start()].count("\n") + 2, m[2]) for m in fences]


@pytest.fixture(scope="module", autouse=True)
def modules_of_the_pages(tmp_path_factory):
    """The blocks ```` ```python file=my_rules.py ```` as files in a folder that Python looks in."""
    folder = tmp_path_factory.mktemp("modules")
    for page in PAGES:
        for block in blocks_of(page):
            if block.kind.startswith("python file="):
                (folder / block.kind.removeprefix("python file=")).write_text(block.text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """What the pages take for given: a model with its tokenizer, `train.jsonl`, and `run/index.arrow` over it."""
    folder = tmp_path_factory.mktemp("world")
    write_jsonl(folder / "train.jsonl", make_word_problems(8))
    tiny_model("llama", vocab_size=400, max_position_embeddings=512).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    config = tokenseek.load_config(
        "gsm8k", [f"model.name_or_path={folder / 'model'}", f"data.sources.0.path={folder / 'train.jsonl'}"]
    )
    prepared = tokenseek.prepare_dataset(config.data, tokenizer)
    (folder / "run").mkdir()
    write_index(folder / "run" / "index.arrow", prepared.dataset, run_fingerprints(config.model, prepared))
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, scored, monkeypatch):
    monkeypatch.chdir(scored)
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.kind not in ("python", "python no-run"):
            continue
        # Blank lines in front give errors the line numbers of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.kind == "python":
            if "trl" in code.co_names:
                pytest.importorskip("trl")
            exec(code, namespace)


def test_the_trainers_page_shows_every_loop():
    ran = "".join(b.text for b in blocks_of(ROOT / "docs" / "trainers.md") if b.kind == "python")
    online, by_index = ran.split("TokenIndex.open", 1)
    for call in ("TokenSeekTrainer(", "\nTrainer(", "SFTTrainer(", "num_items_in_batch=num_items"):
        assert call in by_index and call in online


def commands_in(script):
    """The words of every command of a bash script, without comments and the variables set in front."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if word not in ("&&", "||", ";", "|"):
                if command or not re.fullmatch(r"\w+=.*", word):
                    command.append(word)
            elif command:
                yield command
                command = []


def check_command(words, monkeypatch):
    """Raises where a command of ours would not start: unknown option, preset, setting or file.

    Returns whether it is a command that is checked.
    """
    program, *rest = words
    if program == "tokenseek":
        with monkeypatch.context() as patch:
            patch.setattr(tokenseek.cli, "guarded", lambda run: 0)  # parse, do not run
            assert tokenseek.cli.main(rest) == 0
        _check_settings(rest)
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(rest[1:])
        if args.config_file:
            _require_file(args.config_file)
            resolve_accelerate_config(args.config_file)
        _require_file(args.training_script)
        with monkeypatch.context() as patch:
            patch.setattr(tokenseek.cli, "guarded", lambda run: 0)
            patch.setattr(sys, "argv", [args.training_script, *args.training_script_args])
            tokenseek.cli.run_script(Path(args.training_script).stem)
        _check_settings(args.training_script_args)
    elif words[:2] == ["python", "-m"]:
        if rest[1] != "venv":
            _require_file(rest[1].replace(".", "/") + ".py")
    elif program in ("bash", "python"):
        _require_file(next((word for word in rest if not word.startswith("-")), ""))
    elif words[:2] == ["pip", "install"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("-c", "--constraint", action="append", default=[])
        for file in parser.parse_known_args(rest[1:])[0].constraint:
            _require_file(file)
    else:
        return False
    return True


def _check_settings(words):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--accelerate-config")
    parser.add_argument("--tasks")
    args, _ = parser.parse_known_args(words)
    if args.preset:
        tokenseek.load_config(args.preset, args.set)
    if args.tasks:
        split_tasks(args.tasks)
    if args.accelerate_config:
        resolve_accelerate_config(args.accelerate_config)


def _require_file(name):
    if not (ROOT / name).is_file():
        raise FileNotFoundError(f"{name} is no file of the repository")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks_of(page):
        if block.kind == "bash":
            for words in commands_in(block.text):
                try:
                    check_command(words, monkeypatch)
                except (Exception, SystemExit) as error:
                    pytest.fail(f"{page.name}, block at line {block.line}: {shlex.join(words)}\n{error!r}")


@pytest.mark.parametrize(
    "command",
    [
        "tokenseek train --preset gsm8k --set data.sources.0.path=x.jsonl --accelerate-config ddp",
        "HF_HUB_OFFLINE=1 tokenseek score --preset gsm8k --part 0/4  # a part",
        "tokenseek merge-adapter runs/x/final merged",
        "accelerate launch --config_file accelerate_configs/ddp.yaml launch/train.py --preset gsm8k",
        "cd x && accelerate launch launch/score.py \\\n  --preset gsm8k --set selection.ratio=0.2",
        "tokenseek evaluate runs/x --tasks mmlu:0,held_out_loss --set model.dtype=float32",
        "accelerate launch launch/evaluate.py runs/x --limit 3",
        "bash launch/quickstart.sh; echo done",
        "pip install -c constraints.txt -e .",
    ],
)
def test_good_commands_are_let_through(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    checked = [check_command(words, monkeypatch) for words in commands_in(command)]
    assert any(checked)


@pytest.mark.parametrize(
    "command,error",
    [
        ("tokenseek trian --preset gsm8k", SystemExit),
        ("tokenseek train --no-such-option", SystemExit),
        ("tokenseek train --preset no-such-preset", UserError),
        ("tokenseek train --preset gsm8k --set selection.ratoi=0.1", UserError),
        ("tokenseek train --preset gsm8k --set selection.ratio=2", UserError),
        ("tokenseek train --preset gsm8k --accelerate-config no-such", UserError),
        ("accelerate launch --config_file accelerate_configs/none.yaml launch/train.py", FileNotFoundError),
        ("accelerate launch launch/no_such_script.py", FileNotFoundError),
        ("accelerate launch launch/train.py --preset no-such-preset", UserError),
        ("accelerate launch launch/train.py --part 0/2", SystemExit),
        ("tokenseek evaluate runs/x --tasks arc", UserError),
        ("accelerate launch launch/evaluate.py runs/x --preset gsm8k", SystemExit),
        ("cd x && A=1 bash launch/no-such.sh", FileNotFoundError),
        ("pip install -c no-such.txt .", FileNotFoundError),
    ],
)
def test_bad_commands_are_caught(command, error, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(error):
        for words in commands_in(command):
            check_command(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
