"""Scoring against a plain forward pass without a head over the same tokens: time, and memory above the weights.

python -m benchmarks.seek --shape 110m --lengths 1024 --threads 2 --json out.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.memory import LiveStorages, SavedActivations
from benchmarks.methods import make_batch
from benchmarks.shapes import make_model
from benchmarks.step import DTYPES, MIB, WARM_UP_STEPS, machine, synchronize
from tokenseek.decoder.find import find_decoder
from tokenseek.seeking import TokenScorer


def measure(tokens: int, *, shape: str, batch: int, dtype: str, device: str, repeats: int) -> dict:
    """Median seconds of both, in turn in this process, and bytes at the peak of each above what was there before."""
    model = make_model(shape, dtype=DTYPES[dtype], device=device)
    decoder = find_decoder(model)
    inputs = make_batch(1.0, batch, tokens, model.config.vocab_size, device)
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    scorer = TokenScorer(model)

    @torch.no_grad()
    def forward():
        decoder.body(input_ids=ids, use_cache=False)

    def score():
        scorer.score(ids, mask, ids)

    passes = dict(forward=forward, score=score)
    seconds = {name: [] for name in passes}
    for i in range(WARM_UP_STEPS[device] + repeats):
        for name, run in passes.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= WARM_UP_STEPS[device]:
                seconds[name].append(time.perf_counter() - start)
    row = dict(tokens=tokens, seconds=seconds)
    for name, run in passes.items():
        row[f"{name}_s"] = statistics.median(seconds[name])
        row[f"{name}_peak"] = _peak_above(run, device, [*model.parameters(), *model.buffers()])
    with SavedActivations(model) as saved:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    row["full_saved"] = saved.bytes
    del loss
    return row | dict(
        tokens_per_s=batch * tokens / row["score_s"],
        time_ratio=row["score_s"] / row["forward_s"],
        memory_ratio=row["score_peak"] / row["full_saved"],
    )


def _peak_above(run: Callable[[], None], device: str, weights: list[torch.Tensor]) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with LiveStorages().ignore(weights) as live:
        run()
    return live.peak


def table(rows: list[dict]) -> str:
    lines = [
        "| T | tokens/s | score s | forward s | score/forward | score peak | forward peak | full saved | peak/saved |",
        "|" + " ---: |" * 9,
    ]
    for row in rows:
        peaks = [f"{row[key] / MIB:.1f}" for key in ("score_peak", "forward_peak", "full_saved")]
        times = [f"{row[key]:.4g}" for key in ("tokens_per_s", "score_s", "forward_s")]
        cells = [str(row["tokens"]), *times, f"{row['time_ratio']:.3f}", *peaks, f"{row['memory_ratio']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="110m", help="a name of benchmarks/shapes.py, changed as in 110m:hidden_size=512"
    )
    parser.add_argument("--lengths", default="1024", help="tokens per example, with commas between")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=WARM_UP_STEPS, default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each kind, in turn")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--json", type=Path, help="write everything here too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    options = dict(shape=args.shape, batch=args.batch, dtype=args.dtype, device=args.device, repeats=args.repeats)
    report = dict(command=shlex.join(sys.argv), machine=machine(args.device, args.threads))
    report["rows"] = [measure(int(n), **options) for n in args.lengths.split(",")]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.shape}, {args.dtype}, B = {args.batch}; {report['machine']}; MiB")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
