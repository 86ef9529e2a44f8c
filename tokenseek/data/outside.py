"""A data format from outside: a function, by its import path, from rows of any form to rows of a known kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from tokenseek.data.encoding import digest
from tokenseek.data.reading import parse_row
from tokenseek.errors import UserError
from tokenseek.imported import import_named


def converted(rows: Dataset, path: str, key: str) -> tuple[Dataset, tuple[str, ...]]:
    """Rows of a source that went through a function, and the columns that they have then.

    Args:
        rows: `row` and `place`, see :class:`tokenseek.data.sources.LoadedSource`.
        path: the function's import path; it takes a row, a dict of the data's columns, and returns another.
        key: the source's dotted path in the configuration, for errors.

    Raises:
        UserError: there is no such function, or it fails on a row or returns something else, by the row's place.
    """
    function = import_named(path, f"{key}.convert")
    if not callable(function):
        raise UserError(f"{key}.convert: {path} is {function!r}; it must be a function of a row that returns a row.")
    file = getattr(sys.modules[getattr(function, "__module__", "")], "__file__", None)
    code = Path(file).read_text(encoding="utf-8") if file else ""
    made = rows.map(
        _Converter(function, path, key),
        batched=True,
        desc=f"convert {key}",
        # Without its file nothing tells whether the function has changed.
        new_fingerprint=digest(rows._fingerprint, path, code) if file else None,
        load_from_cache_file=bool(file),
    )
    columns: dict[str, None] = {}
    for row in made["row"]:
        columns |= dict.fromkeys(parse_row(row))
    return made, tuple(columns)


class _Converter:
    def __init__(self, function: Callable[[dict[str, Any]], Any], path: str, key: str) -> None:
        self.function, self.path, self.key = function, path, key

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[str]]:
        pairs = zip(batch["row"], batch["place"], strict=True)
        return {"row": [self._convert(row, place) for row, place in pairs]}

    def _convert(self, row: str, place: str) -> str:
        where = f"{self.key}: {place}: {self.path}"
        try:
            made = self.function(parse_row(row))
        except Exception as error:  # code that is not ours: whatever it raises is reported with the row
            raise UserError(f"{where} fails: {type(error).__name__}: {error}") from error
        if not isinstance(made, dict) or not all(isinstance(name, str) for name in made):
            raise UserError(f"{where} returned {made!r:.60}; it must return a dict of columns by name")
        try:
            return json.dumps(made)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} returned what JSON cannot hold: {error}") from error
