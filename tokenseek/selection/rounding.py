"""How shares of tokens become numbers of tokens."""

import math


def round_half_up(value: float) -> int:
    """The nearest integer, halves up; Python's `round` goes to the even neighbour."""
    return math.floor(value + 0.5)
