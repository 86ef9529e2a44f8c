"""Random SIGKILLs of scoring and training, each followed by the same command again; prints the tally.

    python benchmarks/faults.py --scoring 50 --training 10

Scoring: one rank of two, or all of the launch, is killed at a random moment; the second launch has to make the same
index, byte for byte, as a run that nobody disturbed, without scoring any finished shard again. Training: the launch is
killed at a random moment; the run that is resumed has to log the same losses and gradient norms, step by step, and to
export the same weights.

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
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
SECONDS = 300  # for one launch


@dataclass
class Tally:
    """What happened to the runs of one kind."""

    kind: str
    killed: int = 0
    too_late: int = 0  # the run had ended before it was killed
    same: int = 0
    finished_at_kill: list[int] = field(default_factory=list)
    scored_again: int = 0

    def __str__(self) -> str:
        text = f"{self.kind}: {self.killed} killed ({self.too_late} ended before), {self.same} equal results"
        if self.kind == "scoring":
            text += f", {self.scored_again} finished shards scored again; finished when killed: {self.finished_at_kill}"
        else:
            text += f"; steps taken when killed: {self.finished_at_kill}"
        return text


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


def start(script: str, preset: Path, output: Path, *settings: str, processes: int = PROCESSES) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp_cpu.yaml"]
    command += ["--main_process_port", "0", "--num_processes", str(processes), f"launch/{script}.py"]
    command += ["--preset", str(preset), "--set", f"output_dir={output}"]
    command += [word for setting in settings for word in ("--set", setting)]
    cache = {"HF_DATASETS_CACHE": str(preset.parent / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **cache}
    with open(preset.parent / "last.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def finish(process: subprocess.Popen, log: Path) -> None:
    if status := process.wait(SECONDS):
        raise SystemExit(f"a launch that nobody killed ended with status {status}:\n{log.read_text()[-5000:]}")


def kill(process: subprocess.Popen, one_rank: bool) -> bool:
    """SIGKILL one rank, after which the launcher ends the others, or everything. False if the run has ended before."""
    try:
        ranks = psutil.Process(process.pid).children(recursive=True)
        victims = [random.choice(ranks)] if one_rank and ranks else [psutil.Process(process.pid), *ranks]
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return process.wait(SECONDS) != 0


def shards(output: Path) -> dict[str, tuple[int, int]]:
    found = (output / "index.arrow.shards").glob("shard-*.arrow")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def losses(output: Path) -> list[tuple]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    logs = [json.loads(line) for line in lines if line.endswith("}")]
    return [(log["step"], log["loss"], log["grad_norm"]) for log in logs if "loss" in log]


def disturb_scoring(preset: Path, times: int) -> Tally:
    folder, tally, log = preset.parent, Tally("scoring"), preset.parent / "last.log"
    finish(start("score", preset, folder / "whole"), log)
    expected = (folder / "whole" / "index.arrow").read_bytes()
    for trial in range(times):
        output = folder / f"scoring-{trial}"
        process = start("score", preset, output)
        # Between the first shard and the end: a launch takes far longer to start than to score.
        wait_for(lambda output=output: shards(output), process)
        time.sleep(random.uniform(0, 0.6))
        if kill(process, one_rank=random.random() < 0.5):
            tally.killed += 1
        else:
            tally.too_late += 1
        before = shards(output)
        tally.finished_at_kill.append(len(before))
        process, after = start("score", preset, output), before
        while process.poll() is None:  # the shards are removed when they are merged
            after = shards_if_there(output) or after
            time.sleep(0.01)
        finish(process, log)
        tally.scored_again += sum(after[name] != identity for name, identity in before.items() if name in after)
        tally.same += (output / "index.arrow").read_bytes() == expected
        shutil.rmtree(output)
    return tally


def disturb_training(preset: Path, times: int) -> Tally:
    folder, tally, log = preset.parent, Tally("training"), preset.parent / "last.log"
    index = f"scoring.index={folder}/whole/index.arrow"
    finish(start("train", preset, folder / "trained", index), log)
    expected, weights = losses(folder / "trained"), weights_of(folder / "trained")
    for trial in range(times):
        output = folder / f"training-{trial}"
        process = start("train", preset, output, index)
        moment = random.randrange(len(expected) - 1)
        wait_for(lambda output=output, moment=moment: len(losses(output)) > moment, process)
        if kill(process, one_rank=random.random() < 0.5):
            tally.killed += 1
        else:
            tally.too_late += 1
        tally.finished_at_kill.append(len(losses(output)))
        finish(start("train", preset, output, index), log)
        tally.same += losses(output) == expected and weights_of(output) == weights
        shutil.rmtree(output)
    return tally


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
        time.sleep(0.002)


def main(argv: list[str] | None = None) -> list[Tally]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scoring", type=int, default=50, metavar="N", help="kills of scoring (default: 50)")
    parser.add_argument("--training", type=int, default=10, metavar="N", help="kills of training (default: 10)")
    parser.add_argument("--seed", type=int, help="of the random moments")
    args = parser.parse_args(argv)
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        preset = make_workspace(Path(folder))
        tallies = [disturb_scoring(preset, args.scoring)]
        print(tallies[0], flush=True)
        if args.training:
            tallies.append(disturb_training(preset, args.training))
            print(tallies[1], flush=True)
    return tallies


if __name__ == "__main__":
    failed = [t for t in main() if t.same < t.killed + t.too_late or t.scored_again]
    sys.exit(1 if failed else 0)
