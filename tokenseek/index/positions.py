"""The selected positions of a data set alone, in the form that the paper hands to GPUs before training (section S7).

An index keeps two scores for every token, from which any selection follows. Where the selection is settled, a bit for
every token says as much: half of Open-Platypus's tokens take 0.9 MB, where the paper counts 6.8 MB.

T tokens of an example, S of them selected.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenseek.errors import UserError

_VERSION = 1
_ARRAYS = ("version", "facts", "lengths", "bits")


class SelectedPositions:
    """Which tokens of every example are selected: one bit per token, the examples one after the other.

    Args:
        lengths: int [N], T of each of N examples, all >= 1.
        bits: uint8 [ceil(sum of T / 8)], the flags of all tokens, packed as :func:`numpy.packbits` does.
        facts: what the selection was made with, such as the rule and the fingerprints of the index; JSON values.

    Example:
        >>> chosen = SelectedPositions.of([4, 3], [[0, 3], [2]])
        >>> chosen[0], chosen[1], chosen.nbytes
        (array([0, 3]), array([2]), 1)
    """

    def __init__(self, lengths: np.ndarray, bits: np.ndarray, facts: Mapping[str, Any]) -> None:
        self.lengths, self.bits, self.facts = np.asarray(lengths, np.int64), np.asarray(bits, np.uint8), dict(facts)
        self._begins = np.concatenate([[0], np.cumsum(self.lengths)])

    @classmethod
    def of(
        cls, lengths: Iterable[int], positions: Iterable[np.ndarray], facts: Mapping[str, Any] | None = None
    ) -> SelectedPositions:
        """
        Args:
            lengths: T of each example.
            positions: [S] of each example, every entry in [0, T).

        Raises:
            UserError: a position outside its example, by its row.
        """
        lengths = np.asarray(list(lengths), np.int64)
        begins = np.concatenate([[0], np.cumsum(lengths)])
        flags = np.zeros(begins[-1], bool)
        for row, (length, chosen) in enumerate(zip(lengths, positions, strict=True)):
            chosen = np.asarray(chosen, np.int64)
            if chosen.size and not (0 <= chosen.min() and chosen.max() < length):
                raise UserError(f"example {row} has {length} tokens; positions {chosen.tolist()} are not all in it.")
            flags[begins[row] + chosen] = True
        return cls(lengths, np.packbits(flags), facts or {})

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        """int64 [S], ascending: the selected positions of the example in `row`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row is {row}; there are rows 0 to {len(self) - 1}")
        begin, end = int(self._begins[row]), int(self._begins[row + 1])
        flags = np.unpackbits(self.bits[begin // 8 : -(-end // 8)])
        return np.flatnonzero(flags[begin % 8 : begin % 8 + end - begin])

    @property
    def nbytes(self) -> int:
        """Of the bits alone."""
        return self.bits.nbytes

    def save(self, path: str | Path) -> None:
        """Write a NumPy archive (``.npz``); a file that was there is replaced as a whole."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        smallest = np.uint16 if self.lengths.max(initial=0) < 2**16 else np.uint32
        with open(partial, "wb") as file:
            np.savez(
                file,
                version=np.array(_VERSION, np.uint32),
                facts=np.frombuffer(json.dumps(self.facts, sort_keys=True).encode(), np.uint8),
                lengths=self.lengths.astype(smallest),
                bits=self.bits,
            )
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> SelectedPositions:
        """
        Raises:
            UserError: there is no such file, or it was not written by :meth:`save`, whole.
        """
        fix = "Write it with `tokenseek export-positions`."
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if missing := [name for name in _ARRAYS if name not in arrays]:
                    raise UserError(f"{path} holds no selected positions ({', '.join(missing)} missing). {fix}")
                if int(arrays["version"]) != _VERSION:
                    raise UserError(
                        f"{path} has version {int(arrays['version'])}; this release reads {_VERSION}. {fix}"
                    )
                lengths, bits = arrays["lengths"].astype(np.int64), arrays["bits"]
                facts = json.loads(arrays["facts"].tobytes())
        except FileNotFoundError:
            raise UserError(f"there is no file {path}. {fix}") from None
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged or no archive of NumPy: {error}. {fix}") from error
        if len(bits) != -(-int(lengths.sum()) // 8):
            raise UserError(f"{path} is damaged: {len(bits)} bytes of bits for {lengths.sum()} tokens. {fix}")
        return cls(lengths, bits, facts)
