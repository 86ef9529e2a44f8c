"""A selection rule from outside, by its import path ``my_package.my_module:my_rule``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from tokenseek.errors import UserError
from tokenseek.imported import import_named
from tokenseek.selection.contract import PAPERS, Candidates, Definition, Picked, Settings
from tokenseek.selection.rules import SHIPPED
from tokenseek.spelling import did_you_mean

_READABLE = frozenset({"ratio", "alpha", "beta", "log_offset", "explore", "bands", "seed"})
_FUNCTIONS_READ = _READABLE - {"explore", "bands"}
_EXPECTED = (
    "a function of (candidates, settings), or a class without arguments that has a method pick(candidates, settings)"
)


def rule_named(name: str) -> Definition:
    """The shipped rule of a name, or that at an import path.

    Raises:
        UserError: there is none, or it is no rule.
    """
    if isinstance(name, str) and name in SHIPPED:
        return SHIPPED[name]
    if isinstance(name, str) and ":" in name:
        return _imported(name)
    raise UserError(
        f"selection.rule is {name!r}; accepted is one of {', '.join(SHIPPED)}, or the import path of another "
        f"(my_package.my_module:my_rule){did_you_mean(name, SHIPPED)}."
    )


class OutsideRule:
    """A function or an object as a rule: what it does not say of itself has a default, and what it picks is checked.

    Args:
        name: its import path.
        rule: a function of candidates and settings, or an object with such a method `pick`.

    Raises:
        UserError: what it says of itself is not accepted.
    """

    def __init__(self, name: str, rule: Any) -> None:
        self.name = name
        self._rule = rule
        self._pick = getattr(rule, "pick", rule)
        self.needs_scores: bool = getattr(rule, "needs_scores", True)
        self.weighs: bool = getattr(rule, "weighs", False)
        reads = getattr(rule, "reads", _FUNCTIONS_READ)
        for attribute in ("needs_scores", "weighs"):
            if not isinstance(getattr(self, attribute), bool):
                raise UserError(f"{name}: {attribute} is {getattr(self, attribute)!r}; it must be True or False.")
        if isinstance(reads, str) or not _READABLE.issuperset(reads):
            raise UserError(f"{name}: reads is {reads!r}; it must be a set of {', '.join(sorted(_READABLE))}.")
        self.reads = frozenset(reads)
        defaults = getattr(rule, "defaults", {})
        if not isinstance(defaults, Mapping) or not PAPERS.keys() >= defaults.keys():
            raise UserError(f"{name}: defaults is {defaults!r}; it must be a dict with values of {', '.join(PAPERS)}.")
        self.defaults: Mapping[str, Any] = {**PAPERS, **defaults}

    def share(self, settings: Settings) -> float:
        """Its own `share`, or `ratio` where it has none."""
        own = getattr(self._rule, "share", None)
        share = settings.ratio if own is None else own(settings)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise UserError(f"{self.name}: share returned {share!r}; it must be a share of the tokens, in (0, 1].")
        return share

    def pick(self, candidates: Candidates, settings: Settings) -> Picked:
        """What the rule picks, once it is known to be what :class:`Definition` asks for."""
        picked = self._pick(candidates, settings)
        positions, weights = picked if isinstance(picked, tuple) and len(picked) == 2 else (picked, None)
        if problem := _problem_of(positions, weights, candidates, self.weighs):
            weights_too = " and their weights, finite numbers > 0, as (positions, weights)" if self.weighs else ""
            raise UserError(
                f"{self.name} returned {problem} for the example in row {candidates.row}. It must return a NumPy array "
                f"of integers [S], S >= 1, distinct and out of candidates.positions{weights_too}."
            )
        positions = np.asarray(positions, np.int64)
        return (positions, np.asarray(weights, np.float64)) if self.weighs else positions


@cache
def _imported(path: str) -> OutsideRule:
    found = import_named(path, "selection.rule")
    attribute = path.partition(":")[2]
    where = f"selection.rule is {path!r}, and"
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise UserError(f"{where} {attribute}() fails: {error}. Expected is {_EXPECTED}.") from error
    if not callable(getattr(found, "pick", found)):
        raise UserError(f"{where} {attribute} is {found!r}. Expected is {_EXPECTED}.")
    return OutsideRule(path, found)


def _problem_of(positions: Any, weights: Any, candidates: Candidates, weighs: bool) -> str | None:
    """What is wrong with what a rule picked, if anything is."""
    if not isinstance(positions, np.ndarray):
        return f"a {type(positions).__name__}"
    if positions.dtype.kind not in "iu" or positions.ndim != 1:
        return f"an array of {positions.dtype} of shape {positions.shape}"
    if not positions.size:
        return "no position"
    if foreign := sorted(set(positions.tolist()) - set(candidates.positions.tolist())):
        return f"position {foreign[0]}, which is no candidate,"
    if len(np.unique(positions)) < len(positions):
        return "a position twice"
    if weighs != (weights is not None):
        return "no weights" if weighs else "weights, though it does not say weighs = True,"
    if weighs:
        weights = np.asarray(weights)
        if weights.dtype.kind not in "fiu" or weights.shape != positions.shape:
            return f"weights of {weights.dtype} and shape {weights.shape} for {len(positions)} positions"
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            return "weights that are not all finite and above 0"
    return None
