"""How close two computations of the same numbers have to be, on any processor.

Kernels add in other orders on other processors, so that single numbers which nearly cancel have any relative error.
What holds everywhere is the norm of the difference over the norm of what is expected: a number of roundings of the
precision that computes. That need not be the tensors' own: eager attention takes its softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

# Of a few layers forwards and backwards; what is wrong is off by thousands of times as much.
ROUNDINGS = 256
# Numbers that cancel to nearly nothing keep the roundings of what cancelled: a tensor that is smaller than this share
# of all that it is compared along with counts as this large.
SMALLEST_SHARE = 1 / 32

Value = torch.Tensor | np.ndarray | float | None
Values = Value | Sequence[Value] | Mapping[str, Value]


def tolerance(dtype: torch.dtype = torch.float64, roundings: float = ROUNDINGS) -> float:
    """The relative error that so many roundings in `dtype` leave at most."""
    return roundings * torch.finfo(dtype).eps


def assert_close(
    actual: Values, expected: Values, computed_in: torch.dtype | None = None, *, roundings: float = ROUNDINGS
) -> None:
    """Raise AssertionError where `actual` is further from `expected` than `roundings` in `computed_in` explain.

    Args:
        actual, expected: tensors, arrays or numbers, alone, or several in the same order or by the same names. None,
            for what there is none of, is close to None alone.
        computed_in: the lowest precision that computes; by default the lowest of the tensors' own.
    """
    actual, expected = _named(actual), _named(expected)
    allowed = tolerance(computed_in or _lowest_precision([*actual.values(), *expected.values()]), roundings)
    far = {name: error for name, error in errors(actual, expected).items() if not error <= allowed}  # NaN is far
    assert not far, f"relative errors of {far}, of which {allowed:.1e} is allowed"


def errors(actual: Values, expected: Values) -> dict[str, float]:
    """The relative error of each tensor, ``|actual - expected| / |expected|`` in Euclidean norms."""
    actual, expected = _named(actual), _named(expected)
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())}"
    without = [{name for name, value in given.items() if value is None} for given in (actual, expected)]
    assert without[0] == without[1], f"None in place of {sorted(without[0] ^ without[1])}, or the other way round"
    pairs = {
        name: tuple(torch.as_tensor(x).detach().cpu().double() for x in (actual[name], value))
        for name, value in expected.items()
        if value is not None
    }
    for name, (a, e) in pairs.items():
        assert a.shape == e.shape, f"{name}: {tuple(a.shape)} in place of {tuple(e.shape)}"
    whole = math.hypot(*(e.norm().item() for _, e in pairs.values()))
    return {
        name: _ratio((a - e).norm().item(), max(e.norm().item(), SMALLEST_SHARE * whole))
        for name, (a, e) in pairs.items()
    }


def _ratio(difference: float, norm: float) -> float:
    if norm:
        return difference / norm
    return math.inf if difference else 0.0


def _lowest_precision(values: list[Value]) -> torch.dtype:
    dtypes = [x.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def _named(given: Values) -> dict[str, Value]:
    if isinstance(given, Sequence):
        given = {str(number): value for number, value in enumerate(given)}
    elif not isinstance(given, Mapping):
        given = {"": given}
    return {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
