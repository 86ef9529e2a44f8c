"""A real step on one long example on a CPU, memory and time, and the memory that is planned for it.

    python -m benchmarks.long_context --tokens 32768

A small Llama with LoRA on its feed-forward layers; "above weights" leaves out parameters and optimizer states. Compared
are checkpointing with chunked cross-entropy and TokenSeek at r = 0.1 with recompute; "memory" and "time" are shares of
the former's.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.memory import LiveStorages
from benchmarks.methods import build, make_batch
from benchmarks.plan import LORA, run_config
from benchmarks.shapes import SHAPES, model_config
from tokenseek.planning import Engine, Method, plan_memory

# Four query heads share keys and values, as in Llama 3.
SHAPE = (
    "tiny:hidden_size=128,head_dim=32,num_attention_heads=4,num_key_value_heads=1,intermediate_size=384,"
    "num_hidden_layers=4,vocab_size=2048"
)
METHODS = {
    "full+checkpoint+chunked-ce+lora": Method(recompute=True, chunked_loss=True),
    "tokenseek@0.1+recompute+lora": Method(0.1, recompute=True),
}


def measured(name: str, shape: str, tokens: int) -> tuple[int, float]:
    """Peak bytes above the weights, and seconds, of a forward and backward pass."""
    model, loss_of = build(name, shape, torch.float32, "cpu")
    batch = make_batch(0.1, 1, tokens, model_config(shape).vocab_size, "cpu")
    batch["selected_positions"][:, -1] = tokens - 1  # what lies behind the last selected token would be left out
    start = time.perf_counter()
    with LiveStorages().ignore([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        loss_of(**batch).backward()
    return live.peak, time.perf_counter() - start


def planned(method: Method, shape: str, tokens: int) -> int:
    config = run_config(tokens, *LORA)
    plan = plan_memory(config, method, Engine(on_cpu=True), model_config=model_config(shape))
    return plan.peak - plan.parts["parameters"] - plan.parts["optimizer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--shape", default=SHAPE, help=f"one of {', '.join(SHAPES)}, with changes")
    args = parser.parse_args()
    print("| | planned MiB | measured MiB | planned / measured | seconds | memory | time |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    first: tuple[int, float] | None = None
    for name, method in METHODS.items():
        plan = planned(method, args.shape, args.tokens)
        peak, seconds = measured(name, args.shape, args.tokens)
        first = first or (peak, seconds)
        shares = f"{peak / first[0]:.3f} | {seconds / first[1]:.3f}"
        measured_MiB = f"{plan / 2**20:.1f} | {peak / 2**20:.1f} | {plan / peak:.3f}"
        print(f"| {name} | {measured_MiB} | {seconds:.1f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
