"""Which tokens of an example are tuned: pure functions of its scores.

T tokens in the example (padding not counted), S of them selected.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tokenseek.errors import UserError
from tokenseek.labels import IGNORED

Rule = Literal["top", "random", "all", "bands", "top_random", "sampled"]
Scope = Literal["all", "supervised"]

_SCORED_RULES = ("top", "bands", "top_random", "sampled")
_EXPLORING_RULES = ("top_random", "sampled")


@dataclass(frozen=True)
class SelectionRule:
    """How the tokens of an example are selected.

    Args:
        rule: one of

            - "top": the `ratio` with the highest score (Eq. 5), the method of the paper;
            - "random": as many, at random, drawn anew at every visit (the TokenTune baseline);
            - "all": every token;
            - "bands": the ranks in `bands`, whatever `ratio` is (Table S11);
            - "top_random": the highest scores for most of the budget and random others for `explore` of it;
            - "sampled": drawn anew at every visit, with a probability that grows with the score, and each loss weighted
              by the inverse of its probability, so that the loss has the expectation of the loss of all tokens.
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

    rule: Rule = "top"
    ratio: float = 0.1
    alpha: float = 5.0
    beta: float = 5.0
    log_offset: float = 1e-6
    explore: float = 0.0
    bands: tuple[tuple[float, float], ...] | None = None
    seed: int = 0
    scope: Scope = "all"

    def __post_init__(self):
        _require(self.rule in get_args(Rule), "rule", self.rule, f"one of {', '.join(get_args(Rule))}")
        _require(self.scope in get_args(Scope), "scope", self.scope, f"one of {', '.join(get_args(Scope))}")
        _require(0 < self.ratio <= 1, "ratio", self.ratio, "a share in (0, 1], e.g. 0.1 for 10 % of the tokens")
        for name in ("alpha", "beta", "log_offset"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a finite number >= 0")
        if self.rule in _SCORED_RULES and self.alpha == self.beta == 0:
            raise UserError(f"selection.alpha and selection.beta are both 0; rule {self.rule!r} needs one above 0.")
        if self.rule in _EXPLORING_RULES:
            _require(0 < self.explore <= 1, "explore", self.explore, f"a share in (0, 1] for {self.rule!r}, e.g. 0.1")
        else:
            accepted = f"0 for {self.rule!r}; only {' and '.join(map(repr, _EXPLORING_RULES))} explore"
            _require(self.explore == 0, "explore", self.explore, accepted)
        _require(0 <= self.seed < 2**64, "seed", self.seed, "an integer in [0, 2**64)")
        if (self.rule == "bands") != bool(self.bands):
            raise UserError(
                f"selection.bands is {self.bands} with rule {self.rule!r}; rule 'bands' needs (low, high) fractions, "
                "e.g. [[0, 0.1], [0.4, 0.5]], and the other rules take none."
            )
        if self.bands:
            object.__setattr__(self, "bands", _checked_bands(self.bands))

    @property
    def needs_scores(self) -> bool:
        """Whether the rule selects by score; "random" and "all" can do without an index."""
        return self.rule in _SCORED_RULES

    @property
    def has_weights(self) -> bool:
        """Whether losses are weighted, see :func:`select_weighted`."""
        return self.rule == "sampled"


def combine_scores(
    context: np.ndarray, gradient: np.ndarray, alpha: float = 5.0, beta: float = 5.0, log_offset: float = 1e-6
) -> np.ndarray:
    """Eq. 5 of the paper: I = alpha * log(I1 + log_offset) + beta * minmax(I2).

    Gradient scores that are all the same tell nothing apart, and count 0. A term whose weight is 0 is left out. With a
    `log_offset` of 0 a token that nothing attends to scores -inf, and ranks last.

    Args:
        context: [T], I1 of Eq. 3, >= 0.
        gradient: [T], I2 of Eq. 4.

    Returns:
        float64 [T].

    Example:
        >>> combine_scores(np.array([1.0, 1.0]), np.array([3.0, 7.0]), log_offset=0)
        array([0., 5.])
    """
    context, gradient = np.asarray(context, np.float64), np.asarray(gradient, np.float64)
    if context.ndim != 1 or context.shape != gradient.shape or not context.size:
        raise UserError(
            f"Context scores have shape {context.shape} and gradient scores {gradient.shape}; both must be [T], T >= 1."
        )
    if not (np.isfinite(context).all() and np.isfinite(gradient).all() and (context >= 0).all()):
        raise UserError("Scores must be finite, and context scores not negative. Score the example again.")
    scores = np.zeros(context.shape)
    if alpha:
        with np.errstate(divide="ignore"):
            scores += alpha * np.log(context + log_offset)
    low, high = gradient.min(), gradient.max()
    if beta and high > low:
        scores += beta * (gradient - low) / (high - low)
    return scores


def supervised_positions(labels) -> np.ndarray:
    """Bool [T]: position t predicts token t + 1, so it carries a loss if *that* label is not -100.

    Example:
        >>> supervised_positions([-100, 5, 6])
        array([ True,  True, False])
    """
    labels = np.asarray(labels)
    return np.append(labels[1:] != IGNORED, False)


def select_positions(
    rule: SelectionRule,
    context: np.ndarray | None,
    gradient: np.ndarray | None,
    *,
    row: int,
    visit: int = 0,
    supervised: np.ndarray | None = None,
    num_tokens: int | None = None,
) -> np.ndarray:
    """Select the tokens of one example. The result depends on the arguments alone, not on process, worker or order.

    Of two tokens with the same score the earlier one is preferred.

    Args:
        rule: how to select.
        context: [T], I1 of Eq. 3; None for a rule without scores.
        gradient: [T], I2 of Eq. 4; None for a rule without scores.
        row: the example's position in its data set; with `visit` and `rule.seed` it keys the random draws.
        visit: how often the example was seen before.
        supervised: bool [T], see `supervised_positions`; needed for scope "supervised".
        num_tokens: T, needed without scores. The arrays may be longer: what follows is padding and never selected.

    Returns:
        int64 [S], ascending, S >= 1, every entry below T.

    Example:
        >>> select_positions(SelectionRule(ratio=0.5), np.array([4.0, 1, 2, 3]), np.zeros(4), row=0)
        array([0, 3])
    """
    return select_weighted(rule, context, gradient, row=row, visit=visit, supervised=supervised, num_tokens=num_tokens)[
        0
    ]


def select_weighted(
    rule: SelectionRule,
    context: np.ndarray | None,
    gradient: np.ndarray | None,
    *,
    row: int,
    visit: int = 0,
    supervised: np.ndarray | None = None,
    num_tokens: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`select_positions` selects, and the weight of each position's loss, float64 [S].

    The weights are 1 but for "sampled", where they are the inverse of the probabilities: the sum of the weighted losses
    of the selected positions is an unbiased estimate of the sum over all candidates. Divide it by the number of *all*
    supervised tokens of the step.
    """
    if num_tokens is None and context is None:
        raise UserError("Give num_tokens or scores: without either the length of the example is not known.")
    num_tokens = len(context) if num_tokens is None else num_tokens
    if num_tokens < 1:
        raise UserError(f"The example in row {row} has {num_tokens} tokens; at least 1 is needed to select one.")

    candidates = _candidates(rule.scope, num_tokens, supervised, row)
    if rule.rule == "all":
        return candidates, np.ones(len(candidates))
    budget = min(max(1, _round(rule.ratio * num_tokens)), len(candidates))
    if rule.rule == "random":
        return _unweighted(_shuffled(candidates, rule.seed, row, visit)[:budget])

    context, gradient = _trimmed("context", context, num_tokens, row), _trimmed("gradient", gradient, num_tokens, row)
    scores = combine_scores(context, gradient, rule.alpha, rule.beta, rule.log_offset)
    if rule.rule == "sampled":
        return _sampled(candidates, scores[candidates], budget, rule, row, visit)
    ranking = candidates[np.argsort(-scores[candidates], kind="stable")]
    if rule.rule == "bands":
        return _unweighted(_in_bands(ranking, rule.bands))
    explored = _round(rule.explore * budget)
    top, rest = np.split(ranking, [budget - explored])
    return _unweighted(np.concatenate([top, _shuffled(rest, rule.seed, row, visit)[:explored]]))


def _unweighted(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.sort(positions), np.ones(len(positions))


def _sampled(
    candidates: np.ndarray, scores: np.ndarray, budget: int, rule: SelectionRule, row: int, visit: int
) -> tuple[np.ndarray, np.ndarray]:
    """`budget` candidates, drawn with probabilities that grow with their scores above the least, and their weights."""
    finite = np.isfinite(scores)
    above = np.maximum(scores - scores[finite].min(), 0) if finite.any() else np.zeros(len(scores))
    share = np.full(len(candidates), 1 / len(candidates))
    if above.sum() > 0:
        share = rule.explore * share + (1 - rule.explore) * above / above.sum()
    probability = _inclusion(share, budget)
    # Systematic sampling: the candidates, in random order, lie on a line with lengths that are their probabilities, and
    # a comb with teeth 1 apart is put on it. Every draw has `budget` candidates, and these exact probabilities.
    order = _shuffled(np.arange(len(candidates)), rule.seed, row, visit)
    ends = np.cumsum(probability[order])
    ends[-1] = budget
    offset = _generator(rule.seed, row, visit).random_raw(len(candidates) + 1)[-1] / 2.0**64
    drawn = np.sort(order[np.searchsorted(ends, offset + np.arange(budget), side="right")])
    return candidates[drawn], 1 / probability[drawn]


def _inclusion(share: np.ndarray, budget: int) -> np.ndarray:
    """Probabilities in proportion to `share` (all > 0), but none above 1, that sum to `budget` <= their number."""
    certain = np.zeros(len(share), bool)
    while not certain.all():
        probability = np.where(certain, 1.0, (budget - certain.sum()) * share / share[~certain].sum())
        if (probability <= 1).all():
            return probability
        certain |= probability > 1
    return np.ones(len(share))


def _candidates(scope: Scope, num_tokens: int, supervised: np.ndarray | None, row: int) -> np.ndarray:
    if scope == "supervised":
        positions = np.flatnonzero(_trimmed("supervised", supervised, num_tokens, row))
        if positions.size:
            return positions
    return np.arange(num_tokens)


def _in_bands(ranking: np.ndarray, bands: tuple[tuple[float, float], ...]) -> np.ndarray:
    n = len(ranking)
    picked = np.concatenate([ranking[_round(low * n) : _round(high * n)] for low, high in bands])
    # Bands can all be narrower than one token of a short example: take the one that the first band starts in.
    return picked if picked.size else ranking[[int(bands[0][0] * n)]]


def _shuffled(positions: np.ndarray, seed: int, row: int, visit: int) -> np.ndarray:
    return positions[np.argsort(_generator(seed, row, visit).random_raw(len(positions)), kind="stable")]


def _generator(seed: int, row: int, visit: int) -> np.random.Philox:
    # Philox is a keyed counter: no state to carry between processes, and no two visits share a block of its output.
    # NumPy promises that the raw output never changes, which it does not for `permutation` or `choice`.
    return np.random.Philox(key=np.array([seed, row], np.uint64), counter=np.array([0, 0, 0, visit], np.uint64))


def _trimmed(name: str, values: np.ndarray | None, num_tokens: int, row: int) -> np.ndarray:
    if values is None or len(values) < num_tokens:
        given = "not given" if values is None else f"of length {len(values)}"
        raise UserError(f"{name!r} of row {row} is {given}; this selection needs it for {num_tokens} tokens.")
    return np.asarray(values)[:num_tokens]


def _checked_bands(bands) -> tuple[tuple[float, float], ...]:
    accepted = "(low, high) pairs without overlap, 0 <= low < high <= 1, e.g. [[0, 0.1], [0.4, 0.5]]"
    _require(all(len(band) == 2 for band in bands), "bands", bands, accepted)
    ordered = tuple(sorted((float(low), float(high)) for low, high in bands))
    previous = 0.0
    for low, high in ordered:
        _require(previous <= low < high <= 1, "bands", bands, accepted)
        previous = high
    return ordered


def _require(condition: bool, name: str, value, accepted: str) -> None:
    if not condition:
        raise UserError(f"selection.{name} is {value!r}; accepted is {accepted}.")


def _round(value: float) -> int:
    return math.floor(value + 0.5)  # half up; Python's `round` goes to the even neighbour
