"""Bin packing: the examples of a whole data set in as few rows of `max_length` tokens as first-fit decreasing finds.

Examples of all lengths pad each other's batches; packed, a row holds nearly as many tokens as the next one, and every
step of training costs about the same. The rows follow from the lengths alone, so that all processes have the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tokenseek.errors import UserError
from tokenseek.labels import IGNORED

# The mark of an example that only fills a batch up.
BLANK = "is_blank"


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """Bins of items, each of which holds at most `capacity`.

    The longest items come first, and each goes into the first bin that has room for it; items of equal length keep
    their order. At most 11/9 of the fewest bins that there can be, and one (Dosa, 2007). Finding the bin takes a
    descent in a tree of the free space, so that n items take O(n log n) steps.

    Args:
        lengths: of the items, at least 1 each.
        capacity: of a bin.

    Returns:
        The items of each bin, int64, ascending; bins in the order of their first items.

    Raises:
        UserError: an item is longer than a bin.

    Example:
        >>> first_fit_decreasing([4, 8, 1, 4, 2], 10)
        [array([0, 2, 3]), array([1, 4])]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > capacity:
        raise UserError(f"example {int(lengths.argmax())} has {lengths.max()} tokens, and a row holds {capacity}")
    leaves = 1 << max(0, len(lengths) - 1).bit_length()  # a bin for each item is enough
    free = [capacity] * (2 * leaves)  # free[node]: the most that a bin below it has left; bin b is free[leaves + b]
    bins: list[list[int]] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        length, node = int(lengths[item]), 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= length else 2 * node + 1
        if node - leaves == len(bins):  # bins that are not in use are empty: the first of them is behind the others
            bins.append([])
        bins[node - leaves].append(item)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return sorted((np.sort(np.asarray(items, dtype=np.int64)) for items in bins), key=lambda items: int(items[0]))


class PackedDataset(Dataset[dict[str, Any]]):
    """The rows of :func:`first_fit_decreasing`: each item is a mapping with its `examples`, in data order.

    Collators of this package take such items as they take examples.

    Args:
        examples: mappings with ``input_ids`` and ``labels``.
        max_length: tokens of a row.
    """

    def __init__(self, examples: Any, max_length: int) -> None:
        self.examples, self.max_length = examples, max_length
        self.lengths = np.asarray([len(ids) for ids in examples["input_ids"]], dtype=np.int64)
        self.bins = first_fit_decreasing(self.lengths, max_length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"examples": [self.examples[example] for example in self.bins[row].tolist()]}

    @property
    def filled(self) -> float:
        """Share of the rows' positions that hold a token."""
        return float(self.lengths.sum() / (len(self.bins) * self.max_length))

    def __str__(self) -> str:
        rows = f"{len(self):,} rows of {self.max_length:,} tokens"
        return f"{len(self.lengths):,} examples in {rows}, {self.filled:.1%} full"


def unpacked(features: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The examples of a batch, whose items are examples or rows of a :class:`PackedDataset`."""
    return [example for feature in features for example in feature.get("examples", (feature,))]


def blank_copy(item: dict[str, Any]) -> dict[str, Any]:
    """A copy of an example, or of a row's first, that carries no loss and is marked by :data:`BLANK`."""
    example = item["examples"][0] if "examples" in item else item
    blank = {**example, "labels": [IGNORED] * len(example["labels"]), BLANK: True}
    return {"examples": [blank]} if "examples" in item else blank
