"""How far gradients are off when keys and values wait for the backward pass in 8 bits (``kv_storage: int8``).

    python -m benchmarks.kv_storage MODEL_FOLDER FILE.jsonl --field question --field answer --examples 4

Per example, the relative error of the whole gradient, |g8 - g| / |g|, at a random share of the tokens, all supervised.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.methods import make_batch
from tokenseek.ditching import enable_token_ditching


def gradient(model: nn.Module, kv_storage: str, **batch) -> torch.Tensor:
    """Of all parameters, in one float64 vector."""
    enable_token_ditching(model, kv_storage=kv_storage)
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or name that Transformers loads")
    parser.add_argument("data", type=Path, help="a JSONL file")
    parser.add_argument("--field", action="append", required=True, help="of a line; several are joined by line breaks")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.1)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    errors = []
    print("| tokens | relative error |\n| ---: | ---: |")
    with args.data.open(encoding="utf-8") as lines:
        for seed, line in enumerate(islice(lines, args.examples)):
            row = json.loads(line)
            ids = tokenizer("\n".join(row[name] for name in args.field), return_tensors="pt").input_ids
            positions = make_batch(args.ratio, 1, ids.shape[1], 1, "cpu", seed)["selected_positions"]
            batch = dict(input_ids=ids, labels=ids, selected_positions=positions)
            exact = gradient(model, "device", **batch)
            errors.append(((gradient(model, "int8", **batch) - exact).norm() / exact.norm()).item())
            print(f"| {ids.shape[1]} | {errors[-1]:.4f} |", flush=True)
    print(f"median {statistics.median(errors):.4f}, largest {max(errors):.4f}")


if __name__ == "__main__":
    main()
