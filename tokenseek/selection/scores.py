"""Eq. 5: the two scores of a token as one."""

import numpy as np

from tokenseek.errors import UserError


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
