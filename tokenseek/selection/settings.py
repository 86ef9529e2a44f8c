"""The settings of a selection, checked."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokenseek.errors import UserError
from tokenseek.selection.contract import Definition
from tokenseek.selection.outside import rule_named
from tokenseek.selection.rules import SHIPPED

Scope = Literal["all", "supervised"]

_OF_RULE: Any = None  # what is left out is the rule's own default


@dataclass(frozen=True)
class SelectionRule:
    """How the tokens of an example are selected.

    What is left out is the rule's own default: of "sampled" what taught most per second in docs/evidence.md, of the
    others the paper's.

    Args:
        rule: one of

            - "sampled": drawn again at every visit, with a probability that grows with the score, and each loss
              weighted by the inverse of its probability: the loss has the expectation of the loss of all tokens;
            - "top": the `ratio` with the highest score (Eq. 5), the method of the paper;
            - "random": as many, at random, drawn again at every visit (the TokenTune baseline);
            - "all": every token;
            - "bands": the ranks in `bands`, whatever `ratio` is (Table S11);
            - "top_random": the highest scores for most of the budget and random others for `explore` of it;
            - ``my_package.my_module:my_rule``: a rule of yours, see :class:`tokenseek.selection.Definition`.
        ratio: share of the example's tokens that is selected, in (0, 1]; rounded half up, at least one token. 0.3 of
            "sampled", 0.1 of the others.
        alpha: weight of the context score, >= 0; 0 and 5.
        beta: weight of the gradient score, >= 0; 1 and 5.
        log_offset: added to the context score before its logarithm, >= 0.
        explore: share of the budget drawn at random by "top_random" and "sampled" (there it bounds the weights), in
            (0, 1]; 0.3 of "sampled". 0 for every other rule.
        bands: for "bands", (low, high) fractions of the ranking, best token first: the top 10 % and the 40-50 % band
            are `((0, 0.1), (0.4, 0.5))`. Given in any order, without overlap.
        seed: of the random draws.
        scope: "all" lets every token of the example compete, as in the paper; "supervised" only those whose next
            token carries a loss. The budget stays `ratio` of all T tokens, so that memory does not depend on the scope,
            but an example never gets more than it has supervised tokens; one that has none is treated as in "all".
            "supervised" of "sampled", "all" of the others.

    Raises:
        UserError: a value that is not accepted, by name.
    """

    rule: str = "sampled"
    ratio: float = _OF_RULE
    alpha: float = _OF_RULE
    beta: float = _OF_RULE
    log_offset: float = _OF_RULE
    explore: float = _OF_RULE
    bands: tuple[tuple[float, float], ...] | None = None
    seed: int = 0
    scope: Scope = _OF_RULE

    def __post_init__(self) -> None:
        for name, value in self.definition.defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        reads = self.definition.reads
        _require(self.scope in get_args(Scope), "scope", self.scope, f"one of {', '.join(get_args(Scope))}")
        _require(0 < self.ratio <= 1, "ratio", self.ratio, "a share in (0, 1], e.g. 0.1 for 10 % of the tokens")
        for name in ("alpha", "beta", "log_offset"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a finite number >= 0")
        if self.needs_scores and self.alpha == self.beta == 0:
            raise UserError(f"selection.alpha and selection.beta are both 0; rule {self.rule!r} needs one above 0.")
        if "explore" in reads:
            _require(0 < self.explore <= 1, "explore", self.explore, f"a share in (0, 1] for {self.rule!r}, e.g. 0.1")
        else:
            exploring = " and ".join(repr(name) for name, rule in SHIPPED.items() if "explore" in rule.reads)
            _require(self.explore == 0, "explore", self.explore, f"0 for {self.rule!r}; only {exploring} explore")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "an integer in [0, 2**64)")
        if ("bands" in reads) != bool(self.bands):
            raise UserError(
                f"selection.bands is {self.bands} with rule {self.rule!r}; rule 'bands' needs (low, high) fractions, "
                "e.g. [[0, 0.1], [0.4, 0.5]], and the other rules take none."
            )
        if self.bands:
            object.__setattr__(self, "bands", _checked_bands(self.bands))
        self.definition.share(self)  # a rule from outside can return nonsense

    @property
    def definition(self) -> Definition:
        """What the rule says of itself, and how it picks."""
        return rule_named(self.rule)

    @property
    def needs_scores(self) -> bool:
        """Whether the rule selects by score; one that does not can do without an index."""
        return self.definition.needs_scores

    @property
    def has_weights(self) -> bool:
        """Whether losses are weighted, see :func:`tokenseek.selection.select_weighted`."""
        return self.definition.weighs

    @property
    def draws_by_gradient(self) -> bool:
        """Whether tokens are drawn by the gradient alone, and weighed: what exact layers ask for."""
        return self.has_weights and self.needs_scores and self.alpha == 0

    @property
    def share(self) -> float:
        """Share of an example's tokens that is selected, in (0, 1]."""
        return self.definition.share(self)


def _checked_bands(bands: Iterable[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    accepted = "(low, high) pairs without overlap, 0 <= low < high <= 1, e.g. [[0, 0.1], [0.4, 0.5]]"
    _require(all(len(band) == 2 for band in bands), "bands", bands, accepted)
    ordered = tuple(sorted((float(low), float(high)) for low, high in bands))
    previous = 0.0
    for low, high in ordered:
        _require(previous <= low < high <= 1, "bands", bands, accepted)
        previous = high
    return ordered


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise UserError(f"selection.{name} is {value!r}; accepted is {accepted}.")
