"""Autocast's copies of weights, of which two passes over the same weights must not share one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def autocast_cache(enabled: bool) -> Iterator[None]:
    """Autocast keeps the low-precision copy of a weight; one made without gradient is wrong in the other pass."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(enabled)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
