"""The rows of benchmarks/gpu.sh as tables, with what `tokenseek plan` foretells beside what was measured.

    python -m benchmarks.gpu_report FOLDER [--into docs/performance.md]

Runs anywhere; the plans are made here. Without --into the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.gpu import PARTS
from benchmarks.methods import FEED_FORWARD
from benchmarks.methods import Method as Measured
from benchmarks.pages import write_into
from benchmarks.plan import run_config
from benchmarks.seek import table as seek_table
from benchmarks.selected_attention import table as attention_table
from benchmarks.shapes import model_config
from tokenseek.planning import GPUS, Engine, Gpu, MemoryPlan, Method, plan_memory

Row = dict
GIB, MIB = 2**30, 2**20
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def read_rows(folder: Path) -> list[Row]:
    """In the order of the parts. A line that was being written when its part was ended is left out.

    Raises:
        SystemExit: there are none.
    """
    rows = []
    for name in PARTS:
        path = folder / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{path}: left out an unfinished line", file=sys.stderr)
    if not rows:
        raise SystemExit(f"{folder} has no rows of benchmarks/gpu.sh ({next(iter(PARTS))}.jsonl, ...)")
    return rows


def report(rows: Sequence[Row]) -> str:
    """All tables, in Markdown."""
    of_part: dict[str, list[Row]] = {}
    for row in rows:
        of_part.setdefault(row["part"], []).append(row)
    texts = [_machine(rows)]
    if steps := [row for row in rows if "batch" in row and "method" in row]:
        texts += ["#### Steps", STEPS, step_table(steps)]
    for name, title, table in (
        ("kernels", "Kernels of attention", _kernel_tables),
        ("attention", "Attention of the selected rows", _whole(attention_table)),
        ("scoring", "Scoring", _whole(seek_table)),
        ("tests", "Tests", _tests),
    ):
        if name in of_part:
            texts += [f"#### {title}", table(of_part[name])]
    if faults := [_fault(row) for row in rows if "error" in row or "skipped" in row]:
        texts += ["#### Not measured", "\n".join(faults)]
    if absent := [name for name in PARTS if name not in of_part]:
        texts.append(f"Parts that have no row: {', '.join(absent)}.")
    return "\n\n".join(texts)


STEPS = """\
Optimizer steps in one process for each shape; batches are the same in every step, or new ones with other positions and
lengths (between 3/4 T and T). "host" is when the host has launched everything, "kernels" the sum of their times. Plans
are of `tokenseek plan` for batches of full length; its launches are operations, its ms arithmetic and traffic at 0.6 of
the GPU's peaks."""


def step_table(rows: Sequence[Row]) -> str:
    header = ["model", "B x T", "method", "batches", "ms", "/ full", "host ms", "kernels ms", "launches", "tokens/s"]
    header += ["peak GiB", "/ full", "planned GiB", "planned ms", "planned launches"]
    lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 4)]
    full = {_shape(row): row for row in rows if row["method"] == "full" and "ms" in row}
    plans: dict[tuple, MemoryPlan | None] = {}
    for row in rows:
        if "ms" not in row:
            continue
        ordinary, key = full.get(_shape(row)), (*_shape(row)[:3], row["method"])
        if key not in plans:
            plans[key] = planned(row)
        plan, gpu = plans[key], gpu_of(row["device"])
        line = [row["shape"], f"{row['batch']} x {row['tokens']}", row["method"], row["lengths"]]
        line += [f"{row['ms']:.1f}", _share(row, ordinary, "ms"), f"{row['host_ms']:.1f}", _number(row["kernel_ms"])]
        line += [str(row["launches"]), f"{row['tokens_per_s']:,.0f}"]
        line += [f"{row['peak'] / GIB:.3g}", _share(row, ordinary, "peak")]
        if plan is None:
            line += [""] * 3
        else:
            line += [f"{plan.peak / GIB:.3g}", _number(gpu and 1e3 * plan.work.seconds(gpu))]
            line += [str(plan.work.operations.total())]
        lines.append(line)
    return _markdown(lines)


def planned(row: Row) -> MemoryPlan | None:
    """The plan of a row's step; None for methods that the planner does not know."""
    method, settings = Measured.parse(row["method"]), [f"model.dtype={DTYPES[row['dtype']]}"]
    if method.base == "algorithm1" or method.options & {"chunked-ce", "packed", "compile", "liger"}:
        return None
    settings.append(f"training.per_device_train_batch_size={row['batch']}")
    if method.options & {"lora", "qlora"}:
        settings += ["peft.method=lora", "peft.r=8", f"peft.target_modules=[{','.join(FEED_FORWARD)}]"]
    if "qlora" in method.options:
        settings += ["model.quantization=nf4", "model.double_quantization=true"]
    settings += [f"training.kv_storage={name}" for name in ("host", "int8") if f"kv-{name}" in method.options]
    if method.base == "online":
        reduction = "error" if "error" in method.options else "l2"
        settings += ["scoring.mode=online", f"scoring.reduction={reduction}", "selection.rule=sampled"]
        settings += ["selection.alpha=0", "selection.explore=0.3", f"selection.ratio={method.ratio}"]
        settings.append(f"selection.exact_layers={int('exact' in method.options)}")
    ratio = None if method.base == "full" else method.ratio
    recompute = bool(method.options & {"checkpoint", "recompute"})
    engine = Engine(on_cpu=gpu_of(row["device"]) is None)
    config = run_config(row["tokens"], *settings)
    return plan_memory(config, Method(ratio, recompute), engine, model_config=model_config(row["shape"]))


def gpu_of(device: str) -> Gpu | None:
    """The GPU of the planner's table that a device's name names; None for a CPU, or one that it does not know."""
    squeezed = device.replace(" ", "")
    for name, gpu in GPUS.items():  # L40S before L4
        model, _, memory = name.partition("-")
        if model in squeezed and (not memory or f"{memory}GB" in squeezed):
            return gpu
    return None


def _shape(row: Row) -> tuple:
    return row["shape"], row["batch"], row["tokens"], row.get("lengths")


def _share(row: Row, ordinary: Row | None, key: str) -> str:
    return f"{row[key] / ordinary[key]:.3f}" if ordinary else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _kernel_tables(rows: Sequence[Row]) -> str:
    choices = [["call", "cuDNN", "chosen", "ms", "kernels"], ["---", "---", "---", "---:", "---"]]
    shapes = [["call", "cuDNN", "a new shape, ms", "once more, ms"], ["---", "---", "---:", "---:"]]
    finite = [["keys", "cuDNN", "chosen", "gradients"], ["---:", "---", "---", "---"]]
    for row in rows:
        allowed = "allowed" if row.get("cudnn") else "left out"
        if row["check"] == "choice":
            kernels = ", ".join(f"`{name[:60]}`" for name in dict.fromkeys(row["kernels"]))
            choices.append([row["call"], allowed, row["backend"], f"{row['ms']:.2f}", kernels])
        elif row["check"] == "new shape":
            times = [f"{median(row[key]):.2f}" for key in ("first_ms", "again_ms")]
            shapes.append([row["call"], allowed, *times])
        elif row["check"] == "finite":
            finite.append([str(row["keys"]), allowed, row["backend"], "finite" if row["finite"] else "**not finite**"])
    return "\n\n".join(_markdown(lines) for lines in (choices, shapes, finite))


def _whole(table: Callable[[list[Row]], str]) -> Callable[[Sequence[Row]], str]:
    """A table of the rows that were measured, if any."""

    def of_measured(rows: Sequence[Row]) -> str:
        measured = [row for row in rows if "error" not in row]
        return table(measured) if measured else "None."

    return of_measured


def _tests(rows: Sequence[Row]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    failed = [row["test"] for row in rows if row["outcome"] in ("failed", "error")]
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + "".join(
        f"\n- {name}" for name in failed
    )


def _fault(row: Row) -> str:
    what = [row[key] for key in ("part", "method", "check", "test", "lengths") if row.get(key)]
    return f"- {', '.join(dict.fromkeys(what))}: {row.get('error') or row['skipped']}"


def _machine(rows: Iterable[Row]) -> str:
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    libraries = next((row for row in rows if row.get("check") == "libraries"), {})
    named = ("torch", "cuda", "cudnn", "transformers", "accelerate")
    versions = ", ".join(f"{name} {libraries[name]}" for name in named if name in libraries)
    note = " A rehearsal with tiny shapes: nothing here says anything about a GPU." if rows[0]["rehearsal"] else ""
    return f"{devices}; {versions}.{note}"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what benchmarks/gpu.sh wrote")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put them between the marks of this page")
    args = parser.parse_args()
    text = report(read_rows(args.folder))
    if args.into:
        write_into(args.into, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
