"""Reading a merged index during training."""

from pathlib import Path
from typing import Any

import numpy as np

from tokenseek.errors import UserError
from tokenseek.index.files import ExampleFile
from tokenseek.index.schema import IndexHeader, differences

_FIX = "Delete it and merge its shards again (`tokenseek merge`), or score again (`tokenseek score`)."


class TokenIndex:
    """A merged index, memory-mapped. Rows are the positions of the examples in their data set.

    Picklable: a DataLoader worker maps the file again instead of copying it.

    Example:
        >>> index = TokenIndex.open("run/index.arrow")
        >>> index.require({"tokenizer": prepared.fingerprints["tokenizer"]})
        >>> context, gradient = index.scores(7)
    """

    def __init__(self, file: ExampleFile) -> None:
        self._file = file
        self._row_by_id: dict[str, int] | None = None

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "TokenIndex":
        """Open an index.

        Args:
            path: the file that `merge_shards` wrote.
            verify: read every row once and compare its checksum. Turn off only for a file verified before.

        Raises:
            UserError: there is no such file, or it is truncated or damaged; the message names the example and the fix.
        """
        if not Path(path).exists():
            raise UserError(
                f"There is no file {Path(path).absolute()}. Make it with `tokenseek score`, or with `tokenseek merge` "
                "where all its parts are scored."
            )
        file = ExampleFile(Path(path).absolute(), _FIX)
        header = file.header
        if header.num_examples is None or len(file) == 0 or header.num_examples != len(file):
            raise UserError(
                f"{path} is not a whole index: it holds {len(file)} examples, its header says {header.num_examples} "
                f"(None: it is a shard). {_FIX}"
            )
        if verify:
            file.verify()
            num_tokens = int(file.num_tokens.sum(dtype=np.int64))
            if num_tokens != header.num_tokens:
                raise UserError(f"{path} holds {num_tokens} tokens, its header says {header.num_tokens}. {_FIX}")
            wrong = np.flatnonzero(file.rows != np.arange(len(file)))
            if wrong.size:
                raise UserError(f"{path} has row {file.rows[wrong[0]]} where row {wrong[0]} should be. {_FIX}")
        return cls(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIndex.open, (self.path, False)

    def __len__(self) -> int:
        return len(self._file)

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def header(self) -> IndexHeader:
        """What the scores were made of, and how."""
        return self._file.header

    def scores(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Context (Eq. 3) and gradient (Eq. 4) scores of an example: two read-only float32 [T]."""
        example = self._file.example(self._checked(row))
        return example.context, example.gradient

    def num_tokens(self, row: int) -> int:
        """Of the example `row`, from 0.

        Raises:
            UserError: there is no such example.
        """
        return int(self._file.num_tokens[self._checked(row)])

    def tokens_crc(self, row: int) -> int:
        """CRC-32 of the token ids of the example `row`."""
        return int(self._file.tokens_crcs[self._checked(row)])

    def example_id(self, row: int) -> str:
        """The name of the example `row` in its data."""
        example_id: str = self._file.example_ids[self._checked(row)].as_py()
        return example_id

    def row_of(self, example_id: str) -> int:
        """The row of an example id; `UserError` if the index does not know it."""
        if self._row_by_id is None:
            self._row_by_id = {name: row for row, name in enumerate(self._file.example_ids.to_pylist())}
        if example_id not in self._row_by_id:
            raise UserError(
                f"{self.path} has no example {example_id!r} (it holds {len(self)}, from {self.example_id(0)!r} on). "
                "The data is not the data that was scored: score it, or use the index made for it."
            )
        return self._row_by_id[example_id]

    def require(self, fingerprints: dict[str, str | int]) -> None:
        """Refuse an index that was made for something else.

        Args:
            fingerprints: those of this run; only the keys given are compared.

        Raises:
            UserError: names every differing field with both values.
        """
        stored = {key: value for key, value in self.header.fingerprints.items() if key in fingerprints}
        if differing := differences(stored, fingerprints, "the index", "this run"):
            raise UserError(
                f"{self.path} was not made for this run:\n  " + "\n  ".join(differing) + "\n"
                "Score again with this run's settings, or change them back to those that the index was made with."
            )

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise UserError(f"row is {row}; {self.path} has rows 0 to {len(self) - 1}.")
        return int(row)
