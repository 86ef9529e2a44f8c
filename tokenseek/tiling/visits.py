"""Parts of a step that are alike and many: all are computed, one after the other; a plan takes some for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Part = TypeVar("Part")
Visit = Callable[[Sequence[Any]], Iterator[Any]]
_visit: ContextVar[Visit] = ContextVar("_visit", default=iter)


def visited(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts that are computed."""
    return _visit.get()(parts)


@contextmanager
def visited_by(visit: Visit) -> Iterator[None]:
    """Inside the block, those that `visit` gives: of a layer's tiles, and of the spans of its attention."""
    token = _visit.set(visit)
    try:
        yield
    finally:
        _visit.reset(token)
