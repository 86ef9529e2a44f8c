"""What a selection rule is: what it is given, what it says of itself, and how it picks.

C candidates of an example, S of them picked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np

from tokenseek.errors import UserError
from tokenseek.selection.draws import keyed_draws

Picked: TypeAlias = np.ndarray | tuple[np.ndarray, np.ndarray]

# What a selection leaves out, unless its rule has defaults of its own: the paper's a tenth of all tokens and Eq. 5.
PAPERS: Mapping[str, Any] = MappingProxyType(
    {"ratio": 0.1, "alpha": 5.0, "beta": 5.0, "log_offset": 1e-6, "explore": 0.0, "scope": "all"}
)


class Settings(Protocol):
    """What a rule reads; see :class:`tokenseek.selection.SelectionRule`, which has checked it."""

    @property
    def rule(self) -> str:
        """Its name."""

    @property
    def ratio(self) -> float:
        """The share of the candidates to pick, in (0, 1]."""

    @property
    def alpha(self) -> float:
        """The weight of the context score (Eq. 5)."""

    @property
    def beta(self) -> float:
        """The weight of the gradient score (Eq. 5)."""

    @property
    def log_offset(self) -> float:
        """Added to scores before their logarithm is taken."""

    @property
    def explore(self) -> float:
        """A share of the budget, or of the probability, that does not follow the scores."""

    @property
    def bands(self) -> tuple[tuple[float, float], ...] | None:
        """Ranks to pick, as pairs of shares in [0, 1]."""

    @property
    def seed(self) -> int:
        """Of the draws."""


@dataclass(frozen=True)
class Candidates:
    """The tokens of one example that compete, in the order of their positions.

    Attributes:
        positions: int64 [C], ascending, C >= 1.
        budget: how many tokens `ratio` allows, 1 <= budget <= C.
        scores: float64 [C], Eq. 5; None, as the next two, for a rule that needs no scores.
        context: float64 [C], I1 of Eq. 3.
        gradient: float64 [C], I2 of Eq. 4.
        seed, row, visit: key of the random draws.
    """

    positions: np.ndarray
    budget: int
    scores: np.ndarray | None
    context: np.ndarray | None
    gradient: np.ndarray | None
    seed: int
    row: int
    visit: int

    def draws(self, count: int) -> np.ndarray:
        """uint64 [count], uniform; the same for every call with the same example and visit. Over 2**64: in [0, 1)."""
        return keyed_draws(self.seed, self.row, self.visit, count)

    def ranking(self) -> np.ndarray:
        """Positions [C], the highest score first; of two with the same score the earlier one."""
        return self.positions[np.argsort(-self.known_scores(), kind="stable")]

    def known_scores(self) -> np.ndarray:
        """`scores`, which a rule that needs scores is always given.

        Raises:
            UserError: the rule says that it needs none.
        """
        if self.scores is None:
            raise UserError("a rule reads scores and says needs_scores = False; leave that out, or set it to True.")
        return self.scores


class Definition(Protocol):
    """One rule. The shipped ones are in :mod:`tokenseek.selection.rules`; docs/extending.md shows one from outside.

    Attributes:
        name: by which settings name it.
        needs_scores: whether it picks by score; a rule that does not can do without an index.
        weighs: whether it returns weights of the losses too, such that the weighted sum over what is picked stands for
            the sum over all candidates.
        reads: the settings among "ratio", "alpha", "beta", "log_offset", "explore", "bands" and "seed" that it depends
            on. "explore" and "bands" must not be given for any other rule; a rule that reads them must be given them,
            unless it has a default.
        defaults: values of "ratio", "alpha", "beta", "log_offset", "explore" and "scope" where a selection leaves them
            out.
    """

    name: str
    needs_scores: bool
    weighs: bool
    reads: frozenset[str]
    defaults: Mapping[str, Any]

    def share(self, settings: Settings) -> float:
        """Share of an example's tokens that is picked, in (0, 1]; the memory planner counts with it."""

    def pick(self, candidates: Candidates, settings: Settings) -> Picked:
        """Positions, int64 [S], S >= 1, in any order; a rule that weighs returns (positions, weights float [S])."""
