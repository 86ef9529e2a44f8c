"""The settings of a selection, checked."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tokenseek.errors import UserError
from tokenseek.selection.contract import Definition
from tokenseek.selection.outside import rule_named
from tokenseek.selection.rules import SHIPPED

Scope = Literal["all", "supervised"]


@dataclass(frozen=True)
class SelectionRule:
    """How the tokens of an example are selected.

    Args:
        rule: one of

            - "top": the `ratio` with the highest score (Eq. 5), the method of the paper;
            - "random": as many, at random, drawn again at every visit (the TokenTune baseline);
            - "all": every token;
            - "bands": the ranks in `bands`, whatever `ratio` is (Table S11);
            - "top_random": the highest scores for most of the budget and random others for `explore` of it;
            - "sampled": drawn again at every visit, with a probability that grows with the score, and each loss
              weighted by the inverse of its probability: the loss has the expectation of the loss of all tokens;
            - ``my_package.my_module:my_rule``: a rule of yours, see :class:`tokenseek.selection.Definition`.
        ratio: share of the example's tokens that is selected, in (0, 1]; rounded half up, at least one token.
        alpha: weight of the context score, >= 0.
        beta: weight of the gradient score, >= 0.
        log_offset: added to the context score before its logarithm, >= 0.
        explore: share of the budget drawn at random by "top_random" and "sampled" (there it bounds the weights), in
            (0, 1]; 0 for every other rule.
        bands: for "bands", (low, high) fractions of the ranking, best token first: the top 10 % and the 40-50 % band
            are `((0, 0.1), (0.4, 0.5))`. Given in any order, without overlap.
        seed: of the random draws.
        scope: "all" lets every token of the example compete, as in the paper; "supervised" only those whose next
            token carries a loss. The budget stays `ratio` of all T tokens, so that memory does not depend on the scope,
            but an example never gets more than it has supervised tokens; one that has none is treated as in "all".

    Raises:
        UserError: a value that is not accepted, by name.
    """

    rule: str = "top"
    ratio: float = 0.1
    alpha: float = 5.0
    beta: float = 5.0
    log_offset: float = 1e-6
    explore: float = 0.0
    bands: tuple[tuple[float, float], ...] | None = None
    seed: int = 0
    scope: Scope = "all"

    def __post_init__(self) -> None:
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
