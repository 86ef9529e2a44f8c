"""One optimizer step, over methods and sequence lengths: time, stored activations and peak memory, side by side.

    python -m benchmarks.step --shape 110m --lengths 1024 --threads 2 --json out.json

Every (method, length) runs in a process of its own, once per repeat in turn (A B C A B C ...), so that a machine that
gets slower or busier does so for all alike. Columns are explained in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.allocator import keep_freed_memory
from benchmarks.memory import LiveStorages, SavedActivations, storage_bytes
from benchmarks.methods import DEFAULT_METHODS, Method, build, make_batch, make_ragged_batch
from tokenseek.decoder.find import find_decoder

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_STEPS = {"cpu": 1, "cuda": 3}
MIB = 2**20


def measure(
    method: str,
    tokens: int | str,
    *,
    shape: str,
    batch: int,
    dtype: str,
    device: str,
    steps: int,
    threads: int = 0,
    memory: bool = True,
    supervised: float = 1.0,
) -> dict:
    """Seconds of each step and, with `memory`, bytes: saved, stored, peak, states. A process should measure once.

    Args:
        tokens: of each of `batch` examples, or those of unequal ones as in ``256+512``.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "cpu":
        keep_freed_memory()
    model, loss_of = build(method, shape, DTYPES[dtype], device)
    vocab = find_decoder(model).causal_lm.config.vocab_size
    if isinstance(tokens, str):
        inputs = make_ragged_batch(Method.parse(method), [int(n) for n in tokens.split("+")], vocab, device)
    else:
        ratio = Method.parse(method).ratio
        inputs = make_batch(ratio, batch, tokens, vocab, device, supervised=supervised)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)

    def finish(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed_step() -> float:
        synchronize(device)
        start = time.perf_counter()
        finish(loss_of(**inputs))
        synchronize(device)
        return time.perf_counter() - start

    for _ in range(WARM_UP_STEPS[device]):
        timed_step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = dict(seconds=[timed_step() for _ in range(steps)])
    if not memory:
        return result
    if device == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated()

    # A further step, not timed: counting slows it down.
    kept = [*model.parameters(), *model.buffers(), *inputs.values()]
    kept += [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    kept_bytes = storage_bytes(kept)
    with LiveStorages().ignore(kept) as live:
        with SavedActivations(model) as saved:
            loss = loss_of(**inputs)
        result |= dict(saved=saved.bytes, stored=live.bytes)
        finish(loss)
    result.setdefault("peak", kept_bytes + live.peak)
    result["states"] = kept_bytes + storage_bytes(trainable)  # a gradient is as large as its parameter
    return result


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_all(methods: list[str], lengths: list[int | str], repeats: int, **options) -> list[dict]:
    """One row per (length, method); a method that fails (memory, a missing package) is a row that says so."""
    rows = {
        (tokens, method): dict(method=method, tokens=tokens, seconds=[]) for tokens in lengths for method in methods
    }
    for repeat in range(repeats):
        for (tokens, method), row in rows.items():
            if "error" in row:
                continue
            result = _in_own_process(dict(method=method, tokens=tokens, memory=repeat == 0, **options))
            row |= result | {"seconds": row["seconds"] + result.get("seconds", [])}
            print(f"repeat {repeat + 1}/{repeats} T={tokens} {method}: {_brief(result)}", file=sys.stderr, flush=True)
    for (tokens, _), row in rows.items():
        if "error" in row:
            continue
        row |= dict(step_s=statistics.median(row["seconds"]), above_states=row["peak"] - row["states"])
        full = rows.get((tokens, "full"), {})
        if "error" not in full:
            for key in ("step_s", "saved", "stored", "above_states"):
                if full.get(key):
                    row[f"{key}_to_full"] = row[key] / full[key]
    return list(rows.values())


def _in_own_process(arguments: dict) -> dict:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if arguments["threads"]:
        environment["OMP_NUM_THREADS"] = str(arguments["threads"])
    command = [sys.executable, "-m", "benchmarks.step", "--measure", json.dumps(arguments)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    reason = "out of memory" if "OutOfMemoryError" in process.stderr else process.stderr.strip().splitlines()[-1]
    return {"error": reason if process.returncode > 0 else f"killed by signal {-process.returncode}"}


def _brief(result: dict) -> str:
    return result.get("error") or " ".join(f"{s:.3f}" for s in result["seconds"]) + " s"


def table(rows: list[dict]) -> str:
    """The rows in Markdown; bytes in MiB, and behind each number its ratio to ``full`` at the same length."""
    header = ["T", "method", "step s", "/full", "saved", "/full", "stored", "/full", "peak", "above states", "/full"]
    lines = [header, ["---:", "---", *["---:"] * (len(header) - 2)]]
    for row in rows:
        line = [str(row["tokens"]), row["method"]]
        if "error" in row:
            lines.append([*line, row["error"], *[""] * (len(header) - 3)])
            continue
        line += [f"{row['step_s']:.4g}", _ratio(row, "step_s")]
        for key in ("saved", "stored"):
            line += [f"{row[key] / MIB:.1f}", _ratio(row, key)]
        line += [f"{row['peak'] / MIB:.0f}", f"{row['above_states'] / MIB:.1f}", _ratio(row, "above_states")]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(row: dict, key: str) -> str:
    return f"{row[f'{key}_to_full']:.3f}" if f"{key}_to_full" in row else ""


def machine(device: str, threads: int) -> dict:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    return dict(
        device=name,
        threads=threads or torch.get_num_threads(),
        load=os.getloadavg(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="110m", help="a name of benchmarks/shapes.py, changed as in 110m:hidden_size=512"
    )
    parser.add_argument(
        "--methods", default=DEFAULT_METHODS, help="names as in benchmarks/methods.py, with commas between"
    )
    parser.add_argument(
        "--lengths",
        default="1024",
        help="tokens per example, with commas between; 256+512 is a batch of two unequal examples",
    )
    parser.add_argument("--batch", type=int, default=1, help="examples of a batch, where all are of one length")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that carry a loss")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=WARM_UP_STEPS, default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="processes per method and length")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--json", type=Path, help="write everything here too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child process runs
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    methods = args.methods.split(",")
    lengths = [n if "+" in n else int(n) for n in args.lengths.split(",")]
    for method in methods:
        Method.parse(method)
    names = ("shape", "batch", "dtype", "device", "steps", "threads", "supervised")
    options = {name: getattr(args, name) for name in names}
    report = dict(command=shlex.join(sys.argv), machine=machine(args.device, args.threads))
    report["rows"] = run_all(methods, lengths, args.repeats, **options)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.shape}, {args.dtype}, B = {args.batch}; {report['machine']}; MiB")
    print(table(report["rows"]))
    sys.exit(any("error" in row for row in report["rows"]))


if __name__ == "__main__":
    main()
