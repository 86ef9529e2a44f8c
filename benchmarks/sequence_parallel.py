"""What layouts of sequence parallelism cost: bytes exchanged, time, saved activations, balance, side by side.

    python -m benchmarks.sequence_parallel --ranks 2,4 --ratios 0.1,0.5 --tokens 1024 --json out.json
    python -m benchmarks.sequence_parallel --index run/index.arrow     # balance on the scores of real examples, too

Ranks are gloo processes on one machine: bytes are exact anywhere, times only tell how layouts compare. The exit status
is 1 if the balanced layout exchanges more than (1 + 2r)/2 of stock Ulysses plus 2 %.

Shapes: T tokens, S selected, P ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.memory import SavedActivations
from benchmarks.shapes import make_model
from tokenseek.decoder.find import find_decoder
from tokenseek.index import TokenIndex
from tokenseek.parallel import enable_sequence_parallelism, measured
from tokenseek.selection import SelectionRule, select_positions
from tokenseek.ulysses.layout import cut, deal

# name -> (layout, on all tokens)
LAYOUTS = {
    "stock Ulysses, all tokens": ("contiguous", True),
    "contiguous, not regrouped": ("contiguous", False),
    "regrouped in each layer": ("regroup", False),
    "balanced": ("balanced", False),
}
MIB = 2**20


def clustered_positions(tokens: int, ratio: float, seed: int = 0) -> torch.Tensor:
    """int64 [S]: a share of the tokens that comes in bursts and more often late, as scores of responses do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 1, tokens + 30, generator=generator)
    score = torch.nn.functional.avg_pool1d(noise, 31, stride=1)[0, 0] * 31**0.5 + torch.linspace(0, 1.5, tokens)
    return score.topk(max(1, round(ratio * tokens))).indices.sort().values


def measure(rank: int, ranks: int, shape: str, tokens: int, ratio: float, steps: int) -> dict[str, dict]:
    """Runs in every rank; layouts take turns, so that a machine that gets busier does so for all alike."""
    model = make_model(shape)
    layers = len(find_decoder(model).layers)
    ids = torch.randint(3, 250, (1, tokens), generator=torch.Generator().manual_seed(0))
    chosen = clustered_positions(tokens, ratio)[None]
    results = {name: {"seconds": []} for name in LAYOUTS}
    for step in range(-1, steps):
        for name, (layout, on_all) in LAYOUTS.items():
            enable_sequence_parallelism(model, dist.group.WORLD, layout=layout)
            batch = dict(input_ids=ids, labels=ids, selected_positions=None if on_all else chosen)
            dist.barrier()
            start = time.perf_counter()
            if step < 0:  # a warm-up, in which bytes are counted
                with measured() as traffic, SavedActivations(model) as saved:
                    loss = model(**batch).loss
                saved_bytes = saved.bytes
                with measured() as backward:
                    loss.backward()
                results[name] |= dict(
                    forward=traffic.forward, backward=backward.backward, saved=saved_bytes, layers=layers
                )
            else:
                model(**batch).loss.backward()
                dist.barrier()
                results[name]["seconds"].append(time.perf_counter() - start)
            model.zero_grad()
    return results


def _process(rank: int, ranks: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    torch.save(function(rank, ranks, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def in_processes(ranks: int, function: Callable, *args) -> list:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (ranks, folder, function, args), nprocs=ranks)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]


def rows_max_over_mean(positions: torch.Tensor, tokens: int, ranks: int) -> dict[str, float]:
    """How many of the selected rows [S] the busiest rank holds, over the mean: 1 is even, P is all on one rank."""
    shards = {"contiguous": cut(positions[None], ranks, tokens), "balanced": deal(positions[None], ranks)}
    counts = {name: (shard.positions_BPR[0] >= 0).sum(-1) for name, shard in shards.items()}
    return {name: float(count.max() / count.float().mean()) for name, count in counts.items()}


def balance_of_index(path: str, ratios: list[float], ranks: list[int]) -> list[dict]:
    """Max over mean of selected rows, averaged over the examples of an index."""
    index, rows = TokenIndex.open(path), []
    for ratio in ratios:
        for size in ranks:
            measured_rows = []
            for row in range(len(index)):
                context, gradient = index.scores(row)
                chosen = select_positions(SelectionRule("top", ratio=ratio), context, gradient, row=row)
                if len(chosen) >= size:
                    measured_rows.append(rows_max_over_mean(torch.from_numpy(chosen), len(context), size))
            if measured_rows:
                means = {name: float(np.mean([m[name] for m in measured_rows])) for name in measured_rows[0]}
                rows.append(dict(ratio=ratio, ranks=size, examples=len(measured_rows), **means))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="numbers of processes, comma-separated")
    parser.add_argument("--ratios", default="0.1,0.5")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--shape", default="110m:num_hidden_layers=4,vocab_size=256", help="see benchmarks/shapes.py")
    parser.add_argument("--index", help="an index, for the balance of real selections")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = [int(size) for size in options.ranks.split(",")]
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {options.shape}, T = {options.tokens}, float32")

    records, failed = [], False
    for ranks in sizes:
        for ratio in ratios:
            by_rank = in_processes(ranks, measure, options.shape, options.tokens, ratio, options.steps)
            print(f"\nP = {ranks}, r = {ratio}: bytes are KiB sent per rank and layer, the busiest rank's")
            print(f"{'':28} forward backward  /stock  step s  saved MiB")
            stock = None
            for name in LAYOUTS:
                results = [of_rank[name] for of_rank in by_rank]
                layers = results[0]["layers"]
                forward = max(sum(r["forward"].values()) for r in results) / layers
                backward = max(sum(r["backward"].values()) for r in results) / layers
                stock = stock or forward + backward
                record = dict(
                    ranks=ranks,
                    ratio=ratio,
                    layout=name,
                    forward=forward,
                    backward=backward,
                    over_stock=(forward + backward) / stock,
                    seconds=statistics.median(results[0]["seconds"]),
                    saved=max(r["saved"] for r in results),
                )
                records.append(record)
                print(
                    f"{name:28} {forward / 1024:7.1f} {backward / 1024:8.1f} {record['over_stock']:7.3f} "
                    f"{record['seconds']:7.3f} {record['saved'] / MIB:10.1f}"
                )
            limit = (1 + 2 * ratio) / 2 * 1.02
            ok = records[-1]["over_stock"] <= limit
            failed |= not ok
            print(f"balanced / stock {records[-1]['over_stock']:.3f} {'<=' if ok else '>'} {limit:.3f}")
    balance = []
    if options.index:
        balance = balance_of_index(options.index, ratios, [2, 4, 8])
        print(f"\nselected rows, max over mean of the ranks ({options.index})")
        for row in balance:
            print(
                f"r = {row['ratio']}, P = {row['ranks']}: contiguous {row['contiguous']:.2f}, "
                f"balanced {row['balanced']:.2f} ({row['examples']} examples)"
            )
    if options.json:
        options.json.write_text(json.dumps(dict(command=sys.argv, steps=records, balance=balance), indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
