"""Runs as users start them: through `accelerate launch`, the console command, or a script without any launcher."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import psutil
import pytest
import torch
import yaml
from closeness import assert_close
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model

from tokenseek import cli
from tokenseek.data.toy import make_word_problems

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 480  # seconds; a launch takes about ten, and several when two files are tested at once
NUM_EXAMPLES = 240

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TOKENSEEK = [str(Path(sys.executable).with_name("tokenseek"))]


@dataclass(frozen=True, repr=False)
class Result:
    """What a run left behind."""

    status: int
    out: str
    err: str

    def __repr__(self) -> str:
        return f"exit status {self.status}\n--- stdout ---\n{self.out[-6000:]}\n--- stderr ---\n{self.err[-12000:]}"

    def refusal(self) -> str:
        """The one message of a run that refused its input; anything else fails the test."""
        assert self.status == 2, self
        assert self.err.count("tokenseek: error:") == 1, self
        assert "Traceback" not in self.err, self
        return self.err.split("tokenseek: error: ")[1]


class Workspace:
    """A folder with a tiny model, data and a preset, in which runs are started.

    Attributes:
        preset: the tiny model on all word problems, small batches and many shards.
        training: the same on 21 examples, of which some are cut before their response.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = folder / "model"
        tokenizer = tiny_tokenizer()
        tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        problems = make_word_problems(NUM_EXAMPLES + 30)
        self.data = write_jsonl(folder / "data.jsonl", problems[:NUM_EXAMPLES])
        # 21 is a multiple of no batch; one example in three loses its whole response to the maximum length.
        cut = [
            {**problem, "question": problem["question"] * (6 if row % 3 == 1 else 1)}
            for row, problem in enumerate(problems[:21])
        ]
        held_out = write_jsonl(folder / "heldout.jsonl", problems[NUM_EXAMPLES:][:7])
        sources = {"columns": {"instruction": "question", "response": "answer"}}
        preset = {
            "include": ["_base/small.yaml"],
            "model": {"name_or_path": str(self.model)},
            "data": {"sources": [{"path": str(self.data), **sources}], "max_length": 512},
            "scoring": {"tokens_per_batch": 512, "tokens_per_shard": 512},  # two or three examples
            "selection": {"rule": "top"},
            "peft": {"dropout": 0.0},
            "output_dir": str(folder / "unused"),
        }
        self.preset = self._write("scoring.yaml", preset)
        cut_file = write_jsonl(folder / "cut.jsonl", cut)
        training = {
            **preset,
            "data": {"sources": [{"path": str(cut_file), **sources}], "max_length": 256},
            "eval_data": {"sources": [{"path": str(held_out), **sources}], "max_length": 256},
            # Selects some responses, of other examples none: a model of random weights does not tell them from prompts.
            "selection": {"rule": "top", "ratio": 0.2, "alpha": 2.0},
            "training": {
                "num_train_epochs": 2,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 2,
                "warmup_steps": 2,
                "save_steps": 4,
                "save_total_limit": None,
            },
        }
        self.training = self._write("training.yaml", training)
        self._env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
        }

    def _write(self, name: str, preset: dict) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(preset), encoding="utf-8")
        return path

    def start(self, command: list[str], name: str) -> subprocess.Popen:
        """Start a command whose output goes to the files `name`.out and `name`.err."""
        out, err = (open(self.folder / f"{name}.{stream}", "w", encoding="utf-8") for stream in ("out", "err"))
        with out, err:
            return subprocess.Popen(command, cwd=ROOT, env=self._env, stdout=out, stderr=err, stdin=subprocess.DEVNULL)

    def finish(self, process: subprocess.Popen, name: str) -> Result:
        """Wait for a started command; past the time limit all its processes are killed and the test fails."""
        try:
            status = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            status = "none: it ran past its time"
        return Result(status, *((self.folder / f"{name}.{stream}").read_text("utf-8") for stream in ("out", "err")))

    def launch_command(self, script: str, *arguments: str, processes: int) -> list[str]:
        options = ["--config_file", "accelerate_configs/ddp_cpu.yaml", "--main_process_port", "0"]
        return [*ACCELERATE, *options, "--num_processes", str(processes), f"launch/{script}.py", *map(str, arguments)]

    def launch(self, script: str, *arguments: str, processes: int) -> Result:
        """`accelerate launch` of a script; a failure shows the output of all processes."""
        command = self.launch_command(script, *arguments, processes=processes)
        result = self.finish(self.start(command, "launch"), "launch")
        assert result.status == 0, result
        return result

    def tokenseek(self, *arguments: str) -> Result:
        """The console command, in a process of its own."""
        return self.finish(self.start([*TOKENSEEK, *map(str, arguments)], "tokenseek"), "tokenseek")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("launch")
    # For runs inside this process.
    datasets.config.HF_DATASETS_CACHE = folder / "cache-of-pytest"
    torch.set_num_threads(1)  # more of them only wait for each other, on models so small
    return Workspace(folder)


@pytest.fixture
def script(monkeypatch, capfd) -> Callable[..., Result]:
    """Runs a script of launch/ inside this process, without a launcher: a second instead of ten for imports."""

    def run(name: str, *arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", [f"launch/{name}.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "launch" / f"{name}.py"), run_name="__main__")
        return Result(exit.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def console(capfd) -> Callable[..., Result]:
    """Runs the console command inside this process."""

    def run(*arguments: str) -> Result:
        capfd.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Result(status, *capfd.readouterr())

    return run


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that a launcher has started."""
    return psutil.Process(process.pid).children(recursive=True)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL a launcher and all its workers. They are stopped first, so that none can tell that another is gone."""
    victims = [psutil.Process(process.pid), *workers(process)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for victim in victims:
            if victim.is_running():
                victim.send_signal(number)
    process.wait()
    psutil.wait_procs(victims, timeout=30)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Poll until `condition()`, while a process runs."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, "the process ended before the condition held"
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.002)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every optimizer step."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run) if "loss" in line]


def assert_close_steps(got: list[tuple], expected: list[tuple], computed_in=torch.float32, **roundings) -> None:
    """The same steps, whose losses and gradient norms are close (see `closeness`)."""
    (numbers, *values), (expected_numbers, *expected_values) = (zip(*taken, strict=True) for taken in (got, expected))
    assert numbers == expected_numbers
    names = ("losses", "gradient norms")
    got, expected = ({n: torch.tensor(v) for n, v in zip(names, x, strict=True)} for x in (values, expected_values))
    assert_close(got, expected, computed_in, **roundings)
