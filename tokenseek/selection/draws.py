"""Random draws that depend on their key alone: not on process, worker, order of calls or global state."""

import numpy as np


def keyed_draws(seed: int, row: int, visit: int, count: int) -> np.ndarray:
    """The first `count` draws of the stream of one key, uint64 [count], uniform over all values.

    Args:
        seed: of the selection.
        row: the example's position in its data set.
        visit: how often the example was seen before.
    """
    # Philox is a keyed counter: no state to carry between processes, and no two visits share a block of its output.
    # NumPy promises that the raw output never changes, which it does not for `permutation` or `choice`.
    key, counter = np.array([seed, row], np.uint64), np.array([0, 0, 0, visit], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def shuffled(positions: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The positions in random order: ascending by draws [len(positions)]."""
    return positions[np.argsort(draws, kind="stable")]
