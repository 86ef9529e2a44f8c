"""Attention of selected rows to all keys, with a mask and without: time and memory of one layer, side by side.

    python -m benchmarks.selected_attention --lengths 1024,2048,4096,8192,16384,32768 --ratio 0.1

"masked" is one call with a mask [1, 1, G S, T], "spans" what is done where rows are few (up to four masked calls, whose
rows see no key behind them), "staircase" `tokenseek/tiling/staircase.py`. MiB: "mask" of all masks, which a step
makes once; "extra" is the peak of a forward and a backward pass above queries, keys, values, output and their
gradients, with the masks and whatever was needed to make them.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.memory import LiveStorages
from tokenseek.ditching import attention
from tokenseek.ditching.rows import partition
from tokenseek.tiling.rows import Rows

MIB = 2**20
METHODS = ("masked", "spans", "staircase")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(
    method: str,
    tokens: int,
    ratio: float,
    *,
    heads: int = 12,
    key_heads: int = 3,
    head_dim: int = 64,
    dtype: str = "fp32",
    device: str = "cpu",
    repeats: int = 3,
) -> dict:
    """Seconds of the forward and of both passes (the quickest of `repeats`), and bytes as said above."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, int(ratio * tokens))
    positions = torch.randperm(tokens, generator=generator)[:count].sort().values[None].to(device)

    def normal(length: int, heads: int) -> torch.Tensor:
        made = torch.randn(1, length, heads, head_dim, generator=generator)
        return made.to(device, DTYPES[dtype]).transpose(1, 2).requires_grad_()

    qkv = [normal(count, heads), normal(tokens, key_heads), normal(tokens, key_heads)]
    gradient = normal(count, heads).detach().transpose(1, 2)
    rows = partition(positions, None, tokens).selected
    step = _step(method, rows, heads // key_heads, qkv, gradient)
    with LiveStorages().ignore([*qkv, gradient]) as live:
        output, grads = step()
        kept = sum(x.untyped_storage().nbytes() for x in (output, *grads))
        mask = live.bytes - kept
        extra = live.peak - kept
    del output, grads
    forward, both = [], []
    for _ in range(repeats):
        began = _now(device)
        output = step.forward()
        forward.append(_now(device) - began)
        torch.autograd.grad(output, qkv, gradient)
        both.append(_now(device) - began)
    row = dict(method=method, tokens=tokens, selected=count, forward_s=min(forward), both_s=min(both))
    return row | dict(mask=mask, extra=extra)


class _step:  # noqa: N801 - called like a function
    """One layer's attention, whose masks `rows` keep from the first call on, as those of a step's other layers."""

    def __init__(self, method: str, rows: Rows, groups: int, qkv: list[torch.Tensor], gradient: torch.Tensor):
        self.module = SimpleNamespace(is_causal=True, num_key_value_groups=groups)
        self.method, self.rows, self.qkv, self.gradient = method, rows, qkv, gradient
        if method == "masked":
            rows.spans = [(0, rows.index_BR.shape[1], rows.tokens)]
        self.attend = attention.selected_attention(rows, lambda: None)(sdpa_attention_forward)

    def forward(self) -> torch.Tensor:
        without_staircase = mock.patch.object(attention, "make_spans", return_value=None)
        with nullcontext() if self.method == "staircase" else without_staircase:
            return self.attend(self.module, *self.qkv, None)[0]

    def __call__(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        output = self.forward()
        return output.detach(), torch.autograd.grad(output, self.qkv, self.gradient)


def packed_mask_bytes(row: dict, groups: int, dtype: str) -> int:
    """Of the mask alone that one masked call takes."""
    return groups * row["selected"] * row["tokens"] * DTYPES[dtype].itemsize


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def table(rows: list[dict]) -> str:
    lines = ["| T | S | method | forward ms | both ms | / masked | mask MiB | extra MiB | / mask of masked |"]
    lines.append("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        of_masked = next(r for r in rows if r["method"] == "masked" and r["tokens"] == row["tokens"])
        lines.append(
            f"| {row['tokens']} | {row['selected']} | {row['method']} | {1e3 * row['forward_s']:.1f} | "
            f"{1e3 * row['both_s']:.1f} | {row['both_s'] / of_masked['both_s']:.2f} | {row['mask'] / MIB:.2f} | "
            f"{row['extra'] / MIB:.1f} | {row['extra'] / of_masked['packed_mask']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192", help="T, with commas between")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--heads", default="12,3,64", help="query heads, key/value heads, size of a head")
    parser.add_argument("--methods", default=",".join(METHODS), help="of these three, masked first")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    heads, key_heads, head_dim = map(int, args.heads.split(","))
    rows = []
    for tokens in map(int, args.lengths.split(",")):
        for method in args.methods.split(","):
            shape = dict(heads=heads, key_heads=key_heads, head_dim=head_dim)
            row = measure(
                method, tokens, args.ratio, **shape, dtype=args.dtype, device=args.device, repeats=args.repeats
            )
            row["packed_mask"] = packed_mask_bytes(row, heads // key_heads, args.dtype)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
