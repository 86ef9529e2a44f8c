"""The first row of a file, read with the standard library alone: what it tells is told before heavy imports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tokenseek.config.data import NEEDED_COLUMNS, SourceConfig

# A first row that is longer is left to the reader of whole files.
_BYTES = 1 << 20


def may_lack_columns(source: SourceConfig) -> bool:
    """Whether the first row of a local file has not all columns that the source needs; later rows may have them.

    False where this cannot be told: of folders, Parquet, the hub, rows that are converted or streamed, and files that
    are not there or not valid.
    """
    path = Path(source.path).expanduser() if source.path is not None else None
    if path is None or source.convert or source.streaming or not path.is_file():
        return False
    columns = _first_columns(path)
    return columns is not None and not columns.issuperset(
        getattr(source.columns, name) for name in NEEDED_COLUMNS[source.kind]
    )


def _first_columns(path: Path) -> set[str] | None:
    if path.suffix not in (".json", ".jsonl", ".csv", ".tsv"):
        return None
    with path.open("rb") as file:
        text = file.read(_BYTES).decode("utf-8-sig", errors="ignore")
    try:
        if path.suffix in (".csv", ".tsv"):
            return set(next(csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","), []))
        row, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    except (ValueError, csv.Error, RecursionError):
        return None  # the reader of whole files names the line and the cause
    return set(row)
