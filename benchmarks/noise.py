"""How noisy the gradient of selected tokens is, and how far its mean is from the gradient of all tokens.

    python -m benchmarks.noise --model FOLDER --data FOLDER [--draws 16] [--rows FILE]

A model with LoRA on its feed-forward layers takes a few ordinary steps, so that its adapters are no longer zero. Then
the gradient of one batch is taken on all tokens, g, and by every way to select, once for each draw. For each it prints

- bias: |mean over draws - g|^2 / |g|^2, less what the variance leaves in a mean of so many draws;
- variance: mean of |draw - mean over draws|^2 / |g|^2, of one batch; of a step of n batches it is 1 / n of that;
- cosine: of one draw with g, mean over draws.

No seconds are measured, so that the machine need not be idle.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokenseek
from benchmarks.evidence import base_config
from benchmarks.one_budget import one_budget
from tokenseek import PaddingCollator, SelectionRule, TokenSeekCollator
from tokenseek.ditching import Seeking
from tokenseek.sweeps.sweep import append_row
from tokenseek.sweeps.tables import markdown

RATE = 4e-3


@dataclass(frozen=True)
class Way:
    """A way to select: its name in the table, and what it changes in the library's default.

    Attributes:
        of_batch: the ratio is of the whole batch, so that examples whose scores are large get more of it.
    """

    title: str
    rule: dict[str, Any] = field(default_factory=dict)
    seeking: dict[str, Any] = field(default_factory=dict)
    of_batch: bool = False

    def selection(self, ratio: float) -> SelectionRule:
        """The rule at a ratio."""
        return SelectionRule(**{"ratio": ratio, "scope": "supervised", **self.rule})


WAYS = {
    "uniform": Way("drawn uniformly, weighted", {"explore": 1.0}),
    "error": Way("by the error", seeking={"reduction": "error"}),
    "abs": Way("by the gradient, sum of magnitudes", seeking={"reduction": "abs"}),
    "l2": Way("by the gradient, norm", seeking={"reduction": "l2"}),
    "explore-0.1": Way("the same, explore 0.1", {"explore": 0.1}, {"reduction": "l2"}),
    "explore-0.5": Way("the same, explore 0.5", {"explore": 0.5}, {"reduction": "l2"}),
    "exact-1": Way("1 exact layer", seeking={"reduction": "l2", "exact_layers": 1}),
    "exact-1-all": Way("the same, all tokens compete", {"scope": "all"}, {"reduction": "l2", "exact_layers": 1}),
    "exact-1-0.1": Way("the same, explore 0.1", {"explore": 0.1}, {"reduction": "l2", "exact_layers": 1}),
    "exact-1-batch": Way(
        "1 exact layer, one budget for the batch", seeking={"reduction": "l2", "exact_layers": 1}, of_batch=True
    ),
    "exact-4": Way("4 exact layers", seeking={"reduction": "l2", "exact_layers": 4}),
    "exact-8": Way("8 exact layers", seeking={"reduction": "l2", "exact_layers": 8}),
    "response": Way("all response tokens", {"rule": "all"}),
}


@dataclass(frozen=True)
class Noise:
    """What :func:`measure` finds; see the top of the module."""

    bias: float
    variance: float
    cosine: float


def measure(full: torch.Tensor, draws: list[torch.Tensor]) -> Noise:
    """Of gradients [X] of several draws (at least 2), beside that of all tokens [X]."""
    stacked_KX = torch.stack(draws).double()
    full = full.double()
    mean_X, whole, count = stacked_KX.mean(0), full.square().sum(), len(draws)
    variance = (stacked_KX - mean_X).square().sum() / (count - 1) / whole
    bias = (mean_X - full).square().sum() / whole - variance / count
    cosine = nn.functional.cosine_similarity(stacked_KX, full[None]).mean()
    return Noise(bias.item(), variance.item(), cosine.item())


def gradient_of(model: nn.Module, **batch: Any) -> torch.Tensor:
    """Of all trained parameters, in one row."""
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trained_a_little(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """Ordinary steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for batch in batches:
        gradient_of(model, **batch)
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="examples")
    parser.add_argument("--steps", type=int, default=4, help="ordinary ones before")
    parser.add_argument("--rows", type=Path, help="a file that a line of JSON is added to for each way")
    args = parser.parse_args()

    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    count = args.batch * (args.steps + 1)
    with TemporaryDirectory() as folder:
        args.output, args.regime = Path(folder), "short-4"
        examples = list(tokenseek.prepare_dataset(base_config(args, count).data, tokenizer).dataset)
    pad = PaddingCollator(tokenizer.pad_token_id)
    *before, deciding = (examples[first : first + args.batch] for first in range(0, count, args.batch))
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), adapters)
    trained_a_little(model, [pad(few) for few in before])
    full = gradient_of(model, **pad(deciding))
    table = []
    for name in args.ways:
        way = WAYS[name]
        tokenseek.enable_token_ditching(model, seeking=Seeking(**way.seeking))
        rule = way.selection(args.ratio)
        select = TokenSeekCollator(None, rule=rule, online=True, pad_token_id=tokenizer.pad_token_id)
        draws = []
        with one_budget(way.of_batch):
            for visit in range(args.draws if rule.rule == "sampled" else 1):
                select.set_epoch(visit)
                draws.append(gradient_of(model, **select(deciding)))
        # What is not drawn has no variance.
        noise = measure(full, draws if len(draws) > 1 else draws * 2)
        row = {"way": name, "ratio": args.ratio, "batch": args.batch, "steps": args.steps, "draws": len(draws)}
        if args.rows:
            append_row(args.rows, {**row, **vars(noise)})
        table.append([way.title, f"{noise.bias:.3f}", f"{noise.variance:.3f}", f"{noise.cosine:.3f}"])
        print(f"{way.title}: {noise}", flush=True)
    print(markdown(["selected", "bias", "variance", "cosine"], table))


if __name__ == "__main__":
    main()
