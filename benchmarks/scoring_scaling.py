"""Weak scaling of scoring: two processes of one thread each, with twice the data, against one process of one thread.

    python benchmarks/scoring_scaling.py

Throughput is that of scoring alone, as the launched processes print it, start-up excluded by timing between the first
and the last shard. The machine has to be idle, with as many free cores as processes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import faults
import yaml


def shard_times(output: Path, process) -> list[float]:
    """Times at which shards were finished."""
    times: dict[str, float] = {}
    while process.poll() is None:
        for name, (_, nanoseconds) in faults.shards_if_there(output).items():
            times[name] = nanoseconds / 1e9
        time.sleep(0.01)
    return sorted(times.values())


def shards_per_second(preset: Path, processes: int, name: str) -> float:
    output = preset.parent / f"{name}-{processes}"
    process = faults.start("score", preset, output, processes=processes)
    times = shard_times(output, process)
    faults.finish(process, preset.parent / "last.log")
    # The first of each process has the start-up in it; at the end some have no work left.
    times = times[processes : len(times) - processes]
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--examples", type=int, default=300, help="for each process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        presets = {}
        for processes in (1, 2):
            workspace = Path(folder) / str(processes)
            workspace.mkdir()
            size = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=args.layers)
            preset = faults.make_workspace(workspace, examples=processes * args.examples, **size)
            settings = yaml.safe_load(preset.read_text())
            settings["scoring"] = {"tokens_per_batch": 2048, "tokens_per_shard": 2048}
            preset.write_text(yaml.safe_dump(settings))
            presets[processes] = preset
        ratios = []
        for repeat in range(args.repeats):
            one, two = (shards_per_second(presets[n], n, str(repeat)) for n in (1, 2))
            ratios.append(two / one)
            print(f"one process {one:.2f}, two {two:.2f} shards/s: {two / one:.2f} times", flush=True)
        print(f"median {sorted(ratios)[len(ratios) // 2]:.2f} times the throughput of one process")


if __name__ == "__main__":
    main()
