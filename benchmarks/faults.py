"""Random SIGKILLs of scoring and training, each followed by the same command again; prints the tally.

    python benchmarks/faults.py --scoring 50 --training 10 --log faults.jsonl

Scoring: one rank of two, or all of the launch, is killed at a random moment, start-up and merge included; the second
launch has to make the same index, byte for byte, as a run that nobody disturbed, without scoring any finished shard
again. Training: the same between the first and the last step; the run that is resumed has to log the same losses, step
by step, and to export the same weights.

With `--log`, every kill is a line of that file, and the same command goes on from there: all numbers are totals.
Everything runs on CPUs with a tiny model made here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
SECONDS = 300  # for one launch


@dataclass(frozen=True)
class Kill:
    """What came of one kill.

    Attributes:
        kind: scoring or training.
        victim: one rank or the whole launch; None where the run had ended before.
        progress: shards finished, or steps logged, when it was killed.
        identical: whether the index, or losses and weights, are those of the undisturbed run, bit for bit.
        largest_difference: of a loss or gradient norm from that of the undisturbed run, relative.
        scored_again: shards that were finished when it was killed and were written once more.
    """

    kind: str
    victim: str | None
    progress: int
    identical: bool
    largest_difference: float = 0.0
    scored_again: int = 0


@dataclass
class Tally:
    """What happened to the runs of one kind."""

    kind: str
    kills: list[Kill]

    @property
    def killed(self) -> int:
        return sum(kill.victim is not None for kill in self.kills)

    @property
    def identical(self) -> int:
        return sum(kill.identical for kill in self.kills)

    @property
    def scored_again(self) -> int:
        return sum(kill.scored_again for kill in self.kills)

    @property
    def good(self) -> bool:
        return self.identical == len(self.kills) and not self.scored_again

    def __str__(self) -> str:
        ranks = sum(kill.victim == "rank" for kill in self.kills)
        text = f"{self.kind}: {self.killed} killed ({ranks} times one rank, {self.killed - ranks} times the launch)"
        text += f", {self.identical} of {len(self.kills)} results identical"
        progress = sorted(kill.progress for kill in self.kills if kill.victim)
        if self.kind == "scoring":
            return f"{text}, {self.scored_again} finished shards scored again; shards finished when killed: {progress}"
        largest = max((kill.largest_difference for kill in self.kills), default=0.0)
        return f"{text}, largest relative difference {largest:.1e}; steps logged when killed: {progress}"


class Log:
    """The kills of all calls that share a file, if there is one."""

    def __init__(self, path: Path | None):
        self.path, self.kills = path, []
        if path and path.exists():
            self.kills = [Kill(**json.loads(line)) for line in path.read_text().splitlines()]

    def tally(self, kind: str) -> Tally:
        return Tally(kind, [kill for kill in self.kills if kill.kind == kind])

    def add(self, kill: Kill) -> None:
        self.kills.append(kill)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(kill)) + "\n")


def make_workspace(folder: Path, examples: int = 60, **model: int) -> Path:
    """A preset on a tiny model; scoring has many shards, training many checkpoints.

    Args:
        model: values of its config.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from helpers import tiny_tokenizer, write_jsonl
    from tiny_models import tiny_model

    from tokenseek.data.toy import make_word_problems

    tokenizer = tiny_tokenizer()
    model = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, **model}
    tiny_model("llama", **model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = write_jsonl(folder / "data.jsonl", make_word_problems(examples))
    preset = {
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "data": {"sources": [{"path": str(data), "columns": {"instruction": "question", "response": "answer"}}]},
        "scoring": {"tokens_per_batch": 1, "tokens_per_shard": 256},
        "selection": {"rule": "top_random", "explore": 0.5, "ratio": 0.5},
        "training": {
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "save_steps": 3,
            "logging_steps": 1,
            "report_to": [],
        },
        "output_dir": str(folder / "unused"),
    }
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump(preset), encoding="utf-8")
    return path


def start(script: str, preset: Path, output: Path, *arguments: str, processes: int = PROCESSES) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp_cpu.yaml"]
    command += ["--main_process_port", "0", "--num_processes", str(processes), f"launch/{script}.py"]
    command += ["--preset", str(preset), "--set", f"output_dir={output}", *arguments]
    cache = {"HF_DATASETS_CACHE": str(preset.parent / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **cache}
    with open(preset.parent / "last.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def finish(process: subprocess.Popen, log: Path) -> None:
    if status := process.wait(SECONDS):
        raise SystemExit(f"a launch that nobody killed ended with status {status}:\n{log.read_text()[-5000:]}")


def kill(process: subprocess.Popen) -> str | None:
    """SIGKILL one rank, after which the launcher ends the others, or everything; which, or None if all has ended."""
    try:
        ranks = psutil.Process(process.pid).children(recursive=True)
        victim = random.choice(["rank", "launch"]) if ranks else "launch"
        for killed in [random.choice(ranks)] if victim == "rank" else [psutil.Process(process.pid), *ranks]:
            killed.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        pass
    return victim if process.wait(SECONDS) != 0 else None


def shards(output: Path) -> dict[str, tuple[int, int]]:
    found = (output / "index.arrow.shards").glob("shard-*.arrow")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def losses(output: Path) -> list[tuple]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    logs = [json.loads(line) for line in lines if line.endswith("}")]
    return [(log["step"], log["loss"], log["grad_norm"]) for log in logs if "loss" in log]


def disturb_scoring(preset: Path, times: int, log: Log) -> None:
    folder, output = preset.parent, preset.parent / "scoring"
    began = time.monotonic()
    process = start("score", preset, folder / "whole")
    wait_for(lambda: shards_if_there(folder / "whole"), process)
    startup, plan = time.monotonic() - began, folder / "whole" / "index.arrow.shards" / "plan.json"
    num_shards = json.loads(plan.read_text())["num_shards"]
    finish(process, folder / "last.log")
    expected = (folder / "whole" / "index.arrow").read_bytes()
    while log.tally("scoring").killed < times:
        process, moment = start("score", preset, output), random.randint(0, num_shards)
        if moment:
            wait_for(lambda moment=moment: len(shards_if_there(output)) >= moment, process)
            time.sleep(random.uniform(0, 0.05))
        else:
            time.sleep(random.uniform(0, startup))
        victim = kill(process)
        before = shards_if_there(output)
        process, again = start("score", preset, output), set()
        while process.poll() is None:  # the shards are removed when they are merged
            now = shards_if_there(output)
            again |= {name for name, identity in before.items() if now.get(name, identity) != identity}
            time.sleep(0.05)
        finish(process, folder / "last.log")
        identical = (output / "index.arrow").read_bytes() == expected
        log.add(Kill("scoring", victim, len(before), identical, scored_again=len(again)))
        shutil.rmtree(output)


def disturb_training(preset: Path, times: int, log: Log) -> None:
    folder, output = preset.parent, preset.parent / "training"
    index = ("--set", f"scoring.index={folder}/whole/index.arrow")
    finish(start("train", preset, folder / "trained", *index), folder / "last.log")
    expected, weights = losses(folder / "trained"), weights_of(folder / "trained")
    while log.tally("training").killed < times:
        process, moment = start("train", preset, output, *index), random.randrange(len(expected))
        wait_for(lambda moment=moment: len(losses(output)) > moment, process)
        victim = kill(process)
        progress = len(losses(output))
        finish(start("train", preset, output, *index), folder / "last.log")
        got = losses(output)
        if [step for step, *_ in got] != [step for step, *_ in expected]:
            raise SystemExit(f"killed after step {progress}, the resumed run logged the steps {[s for s, *_ in got]}")
        pairs = zip(chain(*got), chain(*expected), strict=True)
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        identical = [loss for _, loss, _ in got] == [loss for _, loss, _ in expected] and weights_of(output) == weights
        log.add(Kill("training", victim, progress, identical, difference))
        shutil.rmtree(output)


def shards_if_there(output: Path) -> dict[str, tuple[int, int]]:
    try:
        return shards(output)
    except FileNotFoundError:  # merged and removed while we looked
        return {}


def weights_of(output: Path) -> bytes:
    return (output / "final" / "model.safetensors").read_bytes()


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def main(argv: list[str] | None = None) -> list[Tally]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scoring", type=int, default=50, metavar="N", help="kills of scoring (default: 50)")
    parser.add_argument("--training", type=int, default=10, metavar="N", help="kills of training (default: 10)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="kills so far, in JSON lines; new ones are added")
    parser.add_argument("--seed", type=int, help="of the random moments")
    args = parser.parse_args(argv)
    random.seed(args.seed)
    log = Log(args.log)
    with tempfile.TemporaryDirectory() as folder:
        preset = make_workspace(Path(folder))
        disturb_scoring(preset, args.scoring, log)
        print(log.tally("scoring"), flush=True)
        if args.training:
            disturb_training(preset, args.training, log)
            print(log.tally("training"), flush=True)
    return [log.tally(kind) for kind in ("scoring", "training")]


if __name__ == "__main__":
    sys.exit(0 if all(tally.good for tally in main()) else 1)
