"""What `benchmarks.evidence` compares: on what is trained, and in which ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Regime:
    """What is trained on.

    Attributes:
        examples: in an optimizer step.
        steps: of a run.
        solved: problems with their answers in front of each question.
        epochs: about so many times a run sees the training examples; more than once all that there are.
        max_characters: of question and answer.
        adapter: whether LoRA is trained, or all weights.
        rates: learning rates to scan.
    """

    title: str
    examples: int
    steps: int
    micro_batch: int
    solved: int = 0
    max_length: int = 512
    epochs: int = 1
    max_characters: int = 250
    adapter: bool = True
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)


REGIMES = {
    "short-4": Regime("short prompts, steps of 4 examples", 4, 20, 4),
    "short-32": Regime("short prompts, steps of 32 examples", 32, 20, 8, epochs=2),
    "once-32": Regime("problems of up to 300 characters, steps of 32 examples", 32, 16, 8, max_characters=300),
    "long-4": Regime("five solved problems before each question, steps of 4", 4, 20, 4, solved=5, max_length=1024),
    "full-8": Regime(
        "all weights trained, problems of up to 300 characters, steps of 8 examples",
        8,
        20,
        8,
        max_characters=300,
        adapter=False,
        rates=(5e-5, 1e-4, 2e-4, 4e-4),
    ),
}

_ONLINE = {"selection.rule": "sampled", "selection.exact_layers": 0}
_EXACT = {"selection.rule": "sampled"}  # the default


@dataclass(frozen=True)
class Method:
    """A way to train: its title in the table and its settings.

    Attributes:
        takes_ratio: one is among the settings.
        steps_of: another method, whose steps it takes, in another time; so are its rate and its losses at equal steps.
        of_batch: the ratio is of the whole micro batch, see :mod:`benchmarks.one_budget`.
    """

    title: str
    settings: dict[str, Any]
    takes_ratio: bool = True
    steps_of: str | None = None
    of_batch: bool = False


METHODS = {
    "ordinary": Method("ordinary training", {"training.ditching": False}, takes_ratio=False),
    "checkpointing": Method(
        "the same with gradient checkpointing",
        {"training.ditching": False, "training.recompute": True},
        takes_ratio=False,
        steps_of="ordinary",
    ),
    "response": Method(
        "all response tokens, prompts ditched",
        {"selection.rule": "all", "selection.scope": "supervised"},
        takes_ratio=False,
    ),
    "random": Method("random tokens", {"selection.rule": "random"}),
    "paper": Method("the paper's rule: top, alpha = beta = 5, index", {"selection.rule": "top"}),
    "index": Method("drawn by gradient, index", {"selection.rule": "sampled", "scoring.mode": "index"}),
    "online": Method("drawn by gradient, online", _ONLINE),
    "online-error": Method("drawn by error, online", {**_ONLINE, "scoring.reduction": "error"}),
    "exact-1": Method("drawn by gradient, online, 1 exact layer", _EXACT),
    "exact-1-explore-0.1": Method(
        "drawn by gradient, online, 1 exact layer, explore 0.1", {**_EXACT, "selection.explore": 0.1}
    ),
    "exact-1-beta1-0.95": Method(
        "drawn by gradient, online, 1 exact layer, AdamW's beta1 0.95",
        {**_EXACT, "training.extra.adam_beta1": 0.95},
    ),
    "exact-1-beta2-0.99": Method(
        "drawn by gradient, online, 1 exact layer, AdamW's beta2 0.99",
        {**_EXACT, "training.extra.adam_beta2": 0.99},
    ),
    "exact-1-all-tokens": Method(
        "drawn by gradient, online, 1 exact layer, all tokens compete", {**_EXACT, "selection.scope": "all"}
    ),
    "exact-1-batch": Method(
        "drawn by gradient, online, 1 exact layer, one budget for the batch", _EXACT, of_batch=True
    ),
    "online-error-all-tokens": Method(
        "drawn by error, online, all tokens compete",
        {**_ONLINE, "scoring.reduction": "error", "selection.scope": "all"},
    ),
    "exact-4": Method("drawn by gradient, online, 4 exact layers", {**_EXACT, "selection.exact_layers": 4}),
    "exact-8": Method("drawn by gradient, online, 8 exact layers", {**_EXACT, "selection.exact_layers": 8}),
}
