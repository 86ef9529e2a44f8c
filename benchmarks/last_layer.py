"""What it saves that a step's first pass runs its last layer over the tokens that carry a loss.

    python -m benchmarks.last_layer --shape 110m --tokens 1024 --supervised 0.3 --threads 2
    python -m benchmarks.last_layer --shape smollm2-135m --tokens 800 --supervised 0.1 --ratio 0.3 --lora --threads 2

Steps take turns in one process: ordinary training's, and every way to select with the last layer over all tokens and
over those alone. Ratios are medians over the rounds, each to the ordinary step of its round; torch counts arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.allocator import keep_freed_memory
from benchmarks.methods import build, make_batch
from tokenseek.ditching import Seeking, disable_token_ditching, enable_token_ditching, planned
from tokenseek.selection import SelectionRule

SEEKINGS = {"error": Seeking("error"), "gradient": Seeking("l2"), "1 exact layer": Seeking("l2", exact_layers=1)}
RESERVE = 6 * 2**30  # bytes, more than a step takes


def loss_of(
    model: nn.Module, batch: dict[str, torch.Tensor], ratio: float, seeking: Seeking, most: float
) -> torch.Tensor:
    """Of a step that selects, whose last layer runs apart on up to `most` of a text's tokens."""
    enable_token_ditching(model, seeking=seeking)
    rule = SelectionRule("sampled", ratio, alpha=0, beta=1, explore=0.3, scope="supervised")
    try:
        with patch.object(planned, "FEW_SUPERVISED", most):
            return model(**batch, selection=rule, selection_keys=torch.zeros(1, dtype=torch.int64)).loss
    finally:
        disable_token_ditching(model)


def seconds_of(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def arithmetic_of(model: nn.Module, loss: Callable[[], torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counted:
        loss().backward()
    model.zero_grad()
    return counted.get_total_flops()


@dataclass(frozen=True)
class Compared:
    """A way to train: `seconds` of a step, and its time and arithmetic, of ordinary training's."""

    scored_by: str
    over: str
    seconds: float
    time: float
    arithmetic: float


def compare(model: nn.Module, batch: dict[str, torch.Tensor], ratio: float, rounds: int) -> list[Compared]:
    """Ordinary training, and every way to select."""
    losses = {("ordinary training", "all tokens"): lambda: model(**batch, use_cache=False).loss}
    for name, seeking in SEEKINGS.items():
        for over, most in (("all tokens", 0.0), ("tokens with a loss", 1.0)):
            losses[name, over] = partial(loss_of, model, batch, ratio, seeking, most)
    arithmetic = {key: arithmetic_of(model, loss) for key, loss in losses.items()}  # and warms up
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in losses}
    for _ in range(rounds):
        for key, loss in losses.items():
            seconds[key].append(seconds_of(optimizer, loss))
    (ordinary, *_) = losses
    found = []
    for key, own in seconds.items():
        share = statistics.median(mine / all_ for mine, all_ in zip(own, seconds[ordinary], strict=True))
        found.append(Compared(*key, statistics.median(own), share, arithmetic[key] / arithmetic[ordinary]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="110m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--supervised", type=float, default=0.3, help="share of the tokens, at the end")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8 on the feed-forward layers")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory(at_once=RESERVE)
    model, _ = build("full+lora" if args.lora else "full", args.shape, torch.float32, "cpu")
    batch = make_batch(args.ratio, 1, args.tokens, model.config.vocab_size, "cpu", supervised=args.supervised)
    del batch["selected_positions"]
    print("| scored by | last layer over | step s | of ordinary | arithmetic, of ordinary |")
    print("| --- | --- | ---: | ---: | ---: |")
    for row in compare(model, batch, args.ratio, args.rounds):
        print(f"| {row.scored_by} | {row.over} | {row.seconds:.3f} | {row.time:.3f} | {row.arithmetic:.3f} |")


if __name__ == "__main__":
    main()
