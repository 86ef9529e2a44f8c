"""Measurements on a GPU, in parts that each run alone: one JSON line for every row, written as soon as it is known.

    python -m benchmarks.gpu PART --folder FOLDER      benchmarks/gpu.sh runs each in a process with a limit of its own
    python -m benchmarks.gpu --list                    their names and limits in seconds
    python -m benchmarks.gpu PART... --rehearse        the same rows with tiny shapes, on a CPU

Needs torch, transformers, accelerate and pytest; PEFT, bitsandbytes and Liger-Kernel are used where installed. Rows are
printed and appended to FOLDER/PART.jsonl; `python -m benchmarks.gpu_report FOLDER` makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("full", "full+checkpoint+chunked-ce", "tokenseek@0.1", "tokenseek@0.1+recompute", "online@0.1")
LORA = ("full+lora+checkpoint", "tokenseek@0.1+lora", "online@0.1+lora")
FEW_LAUNCHES = ("full+compile", "tokenseek@0.1+compile", "full+liger", "tokenseek@0.1+liger")
QLORA = ("full+qlora", "full+qlora+checkpoint", "tokenseek@0.1+qlora", "tokenseek@0.1+qlora+recompute")
ONE, THREE, EIGHT = "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"
HEADS = {ONE: (32, 8, 64), "tiny": (4, 2, 16)}


@dataclass(frozen=True)
class Setting:
    """Where a part runs: on the GPU with real shapes, or on a CPU with tiny ones."""

    device: str
    dtype: str
    rehearsal: bool

    def shape(self, name: str) -> str:
        return "tiny" if self.rehearsal else name

    def tokens(self, tokens: int) -> int:
        return max(32, tokens // 128) if self.rehearsal else tokens


# Parts import torch when they run: the list of them is wanted at once.


def _kernels(to: Setting) -> Iterator[dict]:
    from benchmarks.gpu_kernels import kernel_rows

    heads = HEADS[to.shape(ONE)]
    return kernel_rows(to.device, to.dtype, to.tokens(2048), heads, shapes=2 if to.rehearsal else 6)


def _steps(shape: str, batch: int, tokens: int, methods: tuple[str, ...], to: Setting) -> Iterator[dict]:
    from benchmarks.gpu_steps import step_rows

    limits = dict(steps=1, seconds=0.0) if to.rehearsal else dict(steps=10, seconds=5.0)
    batch = min(batch, 2) if to.rehearsal else batch
    return step_rows(list(methods), to.shape(shape), batch, to.tokens(tokens), to.device, to.dtype, **limits)


def _attention(to: Setting) -> Iterator[dict]:
    from benchmarks.gpu_steps import reason
    from benchmarks.selected_attention import METHODS as WAYS
    from benchmarks.selected_attention import measure, packed_mask_bytes

    heads, key_heads, head_dim = HEADS[to.shape(ONE)]
    shape = dict(heads=heads, key_heads=key_heads, head_dim=head_dim, dtype=to.dtype, device=to.device)
    for tokens in (2048, 8192, 32768):
        for way in WAYS:
            row = dict(method=way, tokens=to.tokens(tokens))
            try:
                row |= measure(way, to.tokens(tokens), 0.1, repeats=1 if to.rehearsal else 5, **shape)
                row["packed_mask"] = packed_mask_bytes(row, heads // key_heads, to.dtype)
            except Exception as error:
                row["error"] = reason(error)
            yield row


def _scoring(to: Setting) -> Iterator[dict]:
    from benchmarks.gpu_steps import reason
    from benchmarks.seek import measure

    for batch, tokens in ((8, 512), (1, 2048), (8, 2048), (1, 8192)):
        row = dict(shape=to.shape(ONE), batch=min(batch, 2) if to.rehearsal else batch, tokens=to.tokens(tokens))
        options = dict(dtype=to.dtype, device=to.device, repeats=1 if to.rehearsal else 5)
        try:
            row |= measure(row["tokens"], shape=row["shape"], batch=row["batch"], **options)
        except Exception as error:
            row["error"] = reason(error)
        yield row


def _tests(to: Setting) -> Iterator[dict]:
    """The tests marked `gpu`; in a rehearsal all of them are skipped."""
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pytest:
        for line in pytest.stdout or ():
            if found := re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line):
                yield dict(test=found[1], outcome=found[2].lower())
            else:
                print(line, end="", file=sys.stderr)
    if pytest.returncode:
        yield dict(test="all", outcome="failed", error=f"pytest ended with status {pytest.returncode}")


@dataclass(frozen=True)
class Part:
    """What is measured in one process.

    Attributes:
        seconds: after which it is ended.
    """

    seconds: int
    rows: Callable[[Setting], Iterator[dict]]


# In the order in which an answer is wanted.
PARTS = {
    "kernels": Part(60, _kernels),
    "steps-1x2048": Part(100, partial(_steps, ONE, 1, 2048, METHODS)),
    "steps-8x2048": Part(150, partial(_steps, ONE, 8, 2048, METHODS)),
    "steps-1x8192": Part(150, partial(_steps, ONE, 1, 8192, METHODS)),
    "attention": Part(90, _attention),
    "steps-1x32768": Part(150, partial(_steps, ONE, 1, 32768, METHODS)),
    "few-launches": Part(150, partial(_steps, ONE, 1, 2048, FEW_LAUNCHES)),
    "scoring": Part(60, _scoring),
    "tests": Part(120, _tests),
    "qlora-8b": Part(150, partial(_steps, EIGHT, 1, 2048, QLORA)),
    "lora-8b": Part(100, partial(_steps, EIGHT, 1, 2048, LORA)),
    "steps-3b": Part(120, partial(_steps, THREE, 1, 2048, METHODS)),
}


def run_part(name: str, setting: Setting, folder: Path) -> bool:
    """Whether no row tells of an error. Running out of memory is a result and no error."""
    from benchmarks.gpu_kernels import device_name

    folder.mkdir(parents=True, exist_ok=True)
    is_fine = True
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        about = dict(part=name, device=device_name(setting.device), rehearsal=setting.rehearsal)
        for row in PARTS[name].rows(setting):
            line = json.dumps(about | row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
            is_fine &= row.get("error") in (None, "out of memory")
    return is_fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits, and end")
    args = parser.parse_args()
    if args.list:
        for name, part in PARTS.items():
            print(name, part.seconds)
        return
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part is named {', '.join(unknown)}; there are: {' '.join(PARTS)}")
    setting = Setting("cpu", "fp32", True) if args.rehearse else Setting("cuda", "bf16", False)
    are_fine = [run_part(name, setting, args.folder) for name in args.parts or PARTS]
    sys.exit(not all(are_fine))


if __name__ == "__main__":
    main()
