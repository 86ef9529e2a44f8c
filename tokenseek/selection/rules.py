"""The shipped selection rules, one class each, and the dict of them.

C candidates of an example, S of them picked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenseek.selection.contract import PAPERS, Candidates, Definition, Settings
from tokenseek.selection.draws import shuffled
from tokenseek.selection.rounding import round_half_up

_SCORING = frozenset({"alpha", "beta", "log_offset"})


class Top:
    """The highest scores (Eq. 5), the method of the paper."""

    name, needs_scores, weighs = "top", True, False
    reads, defaults = _SCORING | {"ratio"}, PAPERS

    def share(self, settings: Settings) -> float:
        """`ratio`."""
        return settings.ratio

    def pick(self, candidates: Candidates, settings: Settings) -> np.ndarray:
        """The first of the ranking, as many as the budget has."""
        return candidates.ranking()[: candidates.budget]


class Random:
    """As many as "top", at random, drawn again at every visit (the TokenTune baseline)."""

    name, needs_scores, weighs = "random", False, False
    reads, defaults = frozenset({"ratio", "seed"}), PAPERS

    def share(self, settings: Settings) -> float:
        """`ratio`."""
        return settings.ratio

    def pick(self, candidates: Candidates, settings: Settings) -> np.ndarray:
        """The first of the candidates in random order."""
        positions = candidates.positions
        return shuffled(positions, candidates.draws(len(positions)))[: candidates.budget]


class All:
    """Every candidate."""

    name, needs_scores, weighs = "all", False, False
    reads: frozenset[str] = frozenset()
    defaults = PAPERS

    def share(self, settings: Settings) -> float:
        """1: nothing is left out."""
        return 1.0

    def pick(self, candidates: Candidates, settings: Settings) -> np.ndarray:
        """The candidates."""
        return candidates.positions


class Bands:
    """The ranks in `bands`, whatever `ratio` is (Table S11)."""

    name, needs_scores, weighs = "bands", True, False
    reads, defaults = _SCORING | {"bands"}, PAPERS

    def share(self, settings: Settings) -> float:
        """The widths of the bands together."""
        return sum(high - low for low, high in settings.bands or ())

    def pick(self, candidates: Candidates, settings: Settings) -> np.ndarray:
        """The candidates whose ranks are in a band; at least one."""
        ranking, bands = candidates.ranking(), settings.bands or ()
        n = len(ranking)
        picked = np.concatenate([ranking[round_half_up(low * n) : round_half_up(high * n)] for low, high in bands])
        # Bands can all be narrower than one token of a short example: take the one that the first band starts in.
        return picked if picked.size else ranking[[int(bands[0][0] * n)]]


class TopRandom:
    """The highest scores for most of the budget, and random others for `explore` of it."""

    name, needs_scores, weighs = "top_random", True, False
    reads, defaults = _SCORING | {"ratio", "explore", "seed"}, PAPERS

    def share(self, settings: Settings) -> float:
        """`ratio`."""
        return settings.ratio

    def pick(self, candidates: Candidates, settings: Settings) -> np.ndarray:
        """The first of the ranking, and some of the rest in random order."""
        explored = round_half_up(settings.explore * candidates.budget)
        top, rest = np.split(candidates.ranking(), [candidates.budget - explored])
        return np.concatenate([top, shuffled(rest, candidates.draws(len(rest)))[:explored]])


class Sampled:
    """Drawn again at every visit, with a probability that grows with the score above the least, and each loss weighted
    by the inverse of its probability, so that the loss has the expectation of the loss of all candidates."""

    name, needs_scores, weighs = "sampled", True, True
    reads = _SCORING | {"ratio", "explore", "seed"}
    # What taught most per second of all that was compared, see docs/evidence.md: by the gradient alone, among tokens
    # that carry a loss.
    defaults: Mapping[str, Any] = {
        **PAPERS,
        "ratio": 0.3,
        "alpha": 0.0,
        "beta": 1.0,
        "explore": 0.3,
        "scope": "supervised",
    }

    def share(self, settings: Settings) -> float:
        """`ratio`."""
        return settings.ratio

    def pick(self, candidates: Candidates, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
        """Positions, and the inverse of the probability of each."""
        count, budget = len(candidates.positions), candidates.budget
        probability = inclusion_probabilities(_shares(candidates.known_scores(), settings.explore), budget)
        # Systematic sampling: the candidates, in random order, lie on a line with lengths that are their probabilities,
        # and a comb with teeth 1 apart is put on it. Every draw has `budget` candidates, and these exact probabilities.
        draws = candidates.draws(count + 1)
        order = shuffled(np.arange(count), draws[:-1])
        ends = np.cumsum(probability[order])
        ends[-1] = budget
        drawn = order[np.searchsorted(ends, draws[-1] / 2.0**64 + np.arange(budget), side="right")]
        return candidates.positions[drawn], 1 / probability[drawn]


def _shares(scores: np.ndarray, explore: float) -> np.ndarray:
    """Shares of the draws [C], > 0, that sum to 1: `explore` of them uniform, the others by score above the least."""
    finite = np.isfinite(scores)
    above = np.maximum(scores - scores[finite].min(), 0) if finite.any() else np.zeros(len(scores))
    uniform = np.full(len(scores), 1 / len(scores))
    return explore * uniform + (1 - explore) * above / above.sum() if above.sum() > 0 else uniform


def inclusion_probabilities(share: np.ndarray, budget: int) -> np.ndarray:
    """Probabilities [C] in proportion to `share` (all > 0), but none above 1, that sum to `budget` <= C."""
    certain = np.zeros(len(share), bool)
    while not certain.all():
        probability = np.where(certain, 1.0, (budget - certain.sum()) * share / share[~certain].sum())
        if (probability <= 1).all():
            return probability
        certain |= probability > 1
    return np.ones(len(share))


SHIPPED: dict[str, Definition] = {rule.name: rule for rule in (Top(), Random(), All(), Bands(), TopRandom(), Sampled())}
