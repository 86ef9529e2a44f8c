"""Weak scaling of scoring: two processes of one thread each, with twice the data, against one process of one thread.

    python benchmarks/scoring_scaling.py

Throughput is that of scoring alone, in shards a second by the times of their files: without the first ones, which have
the start-up in them, and the last, when some processes have no work left. `--part 0/1` scores all and merges nothing:
the files stay. The machine has to be idle, with as many free cores as processes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import faults
import yaml


def shards_per_second(preset: Path, processes: int, name: str) -> float:
    output = preset.parent / f"{name}-{processes}"
    process = faults.start("score", preset, output, "--part", "0/1", processes=processes)
    faults.finish(process, preset.parent / "last.log")  # asleep until then: a look at the folder would take a core
    times = sorted(nanoseconds / 1e9 for _, nanoseconds in faults.shards(output).values())
    times = times[processes : len(times) - processes]
    return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--examples", type=int, default=600, help="for each process (default: 600)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        presets = {}
        for processes in (1, 2):
            workspace = Path(folder) / str(processes)
            workspace.mkdir()
            size = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=args.layers)
            preset = faults.make_workspace(workspace, examples=processes * args.examples, **size)
            settings = yaml.safe_load(preset.read_text())
            settings["scoring"] = {"tokens_per_batch": 1024, "tokens_per_shard": 1024}
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
