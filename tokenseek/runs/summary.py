"""What a training run reports of itself: its summary, the tokens it selected, and the rows of its model card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from tokenseek.config.sizes import format_size
from tokenseek.labels import IGNORED
from tokenseek.training import TokenSeekCollator, TokenSeekTrainer
from tokenseek.training.progress import format_seconds


@dataclass(frozen=True)
class TrainingSummary:
    """What a run did; written to ``summary.json``.

    Attributes:
        tokens: that went through the model, padding not counted, in all processes.
        seconds: of the training steps alone, without loading, scoring and evaluation.
        peak_memory_bytes: of the busiest process while it trained: allocated on its GPU, or resident on a CPU.
        average_memory_bytes: allocated by the busiest process, on average over the time of the traced steps
            (:mod:`tokenseek.runs.allocation`); None where none was traced.
        step_peak_bytes: the most that was allocated at once in the same steps. On a CPU, this and not the resident
            memory is what to compare the average with.
        loss_before, loss_after: held-out loss in nats per token; None without `eval_data` (before: or when resumed).
        selected_share: selected tokens of all tokens, in the first examples; 1 without ditching.
        supervised_share: of those, the tokens that carry a loss.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    average_memory_bytes: int | None
    step_peak_bytes: int | None
    train_loss: float
    loss_before: float | None
    loss_after: float | None
    trainable_parameters: int
    selected_share: float
    supervised_share: float
    final: str

    def report(self, output: Path) -> str:
        """What was done, learned and taken, where it is and how to try it; `output` is the run's folder."""
        losses = [f"{loss:.4f}" for loss in (self.loss_before, self.loss_after) if loss is not None]
        parts = [f"{self.steps:,} step{'s' * (self.steps != 1)} in {format_seconds(self.seconds)}"]
        if self.loss_after is not None:
            parts.append(f"held-out loss {' -> '.join(losses)}")
        if self.step_peak_bytes:
            parts.append(f"{format_size(self.step_peak_bytes)} at the peak of a step")
        return f"done: {', '.join(parts)}. The result is in {self.final}; `tokenseek chat {output}` talks to it."


@dataclass(frozen=True)
class Selected:
    """How many tokens of the first examples are selected, and how many of those carry a loss."""

    examples: int
    tokens: int
    selected: int
    supervised: int

    @classmethod
    def among(cls, collator: TokenSeekCollator, dataset: Dataset, examples: int = 256) -> Selected:
        """In the first `examples` examples of a data set, as the collator selects in its first epoch."""
        first = dataset.select(range(min(examples, len(dataset))))
        selected = supervised = 0
        for example in first:
            batch = collator([example])
            selected += batch["selected_positions"].shape[1]
            supervised += int(batch["shift_labels"].ne(IGNORED).sum())
        return cls(len(first), sum(map(len, first["input_ids"])), selected, supervised)

    @classmethod
    def by_steps(cls, trainer: TokenSeekTrainer) -> Selected:
        """Of the steps of a run that selected their tokens themselves, over all processes."""
        counts = torch.tensor(
            [int(n) for n in (trainer.online.tokens, trainer.online.selected, trainer.online.supervised)]
        )
        counts = trainer.accelerator.reduce(counts.to(trainer.args.device), reduction="sum").tolist()
        tokens, selected, supervised = (max(1, count) for count in counts)
        return cls(0, tokens, selected, supervised)

    def report(self) -> str:
        """A sentence, with a warning where no selected token carries a loss."""
        report = (
            f"Selection in the first {self.examples} examples: {self.selected:,} of {self.tokens:,} tokens, "
            f"{self.supervised / self.selected:.0%} of which carry a loss."
        )
        if not self.supervised:
            report += (
                "\nWARNING: no selected token carries a loss, so that nothing is learned from them. Raise "
                "selection.ratio or selection.beta, or set selection.scope=supervised."
            )
        return report


def card_rows(summary: TrainingSummary, examples: int | None) -> dict[str, str]:
    """Rows of the model card; `examples` is None where they were streamed."""
    rows = {
        "examples": "streamed" if examples is None else f"{examples:,}",
        "optimizer steps": f"{summary.steps:,}",
        "trainable parameters": f"{summary.trainable_parameters:,}",
        "tokens per second": f"{summary.tokens_per_second:,.0f}",
        "peak memory per process": f"{summary.peak_memory_bytes / 2**30:.2f} GiB",
    }
    if summary.average_memory_bytes is not None:
        rows["average memory per process"] = f"{summary.average_memory_bytes / 2**30:.2f} GiB"
    for name, loss in (("before", summary.loss_before), ("after", summary.loss_after)):
        if loss is not None:
            rows[f"held-out loss {name}"] = f"{loss:.4f} nats per token (perplexity {math.exp(loss):.2f})"
    return rows
