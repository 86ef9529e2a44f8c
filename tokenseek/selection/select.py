"""The selection of one example's tokens by any rule.

T tokens in the example (padding not counted), S of them selected.
"""

import numpy as np
import numpy.typing as npt

from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.selection.contract import Candidates
from tokenseek.selection.rounding import round_half_up
from tokenseek.selection.scores import combine_scores
from tokenseek.selection.settings import Scope, SelectionRule


def supervised_positions(labels: npt.ArrayLike) -> np.ndarray:
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

    The weights are 1 but for a rule that weighs: of "sampled" they are the inverse of the probabilities, and the sum of
    the weighted losses of the selected positions is an unbiased estimate of the sum over all candidates. Divide it by
    the number of *all* supervised tokens of the step.
    """
    if num_tokens is None:
        if context is None:
            raise UserError("Give num_tokens or scores: without either the length of the example is not known.")
        num_tokens = len(context)
    if num_tokens < 1:
        raise UserError(f"The example in row {row} has {num_tokens} tokens; at least 1 is needed to select one.")

    positions = _competing(rule.scope, num_tokens, supervised, row)
    scores = context_C = gradient_C = None
    if rule.needs_scores:
        context = _trimmed("context", context, num_tokens, row)
        gradient = _trimmed("gradient", gradient, num_tokens, row)
        # Eq. 5 ranges over all tokens of the example, whatever competes.
        scores = combine_scores(context, gradient, rule.alpha, rule.beta, rule.log_offset)[positions]
        context_C, gradient_C = (np.asarray(values[positions], np.float64) for values in (context, gradient))
    budget = min(max(1, round_half_up(rule.ratio * num_tokens)), len(positions))
    candidates = Candidates(positions, budget, scores, context_C, gradient_C, rule.seed, row, visit)
    picked = rule.definition.pick(candidates, rule)
    chosen, weights = picked if isinstance(picked, tuple) else (picked, np.ones(len(picked)))
    order = np.argsort(chosen, kind="stable")
    return chosen[order], weights[order]


def _competing(scope: Scope, num_tokens: int, supervised: np.ndarray | None, row: int) -> np.ndarray:
    if scope == "supervised":
        positions = np.flatnonzero(_trimmed("supervised", supervised, num_tokens, row))
        if positions.size:
            return positions
    return np.arange(num_tokens)


def _trimmed(name: str, values: np.ndarray | None, num_tokens: int, row: int) -> np.ndarray:
    if values is None or len(values) < num_tokens:
        given = "not given" if values is None else f"of length {len(values)}"
        raise UserError(f"{name!r} of row {row} is {given}; this selection needs it for {num_tokens} tokens.")
    return np.asarray(values)[:num_tokens]
