"""Streaming: rows that are read while a run trains on them, in place of a data set that is made before.

Rows come in the order of the sources, or shuffled in a buffer, pass after pass without end. Process p of n takes every
n-th of them from the p-th on, counted over all passes, so that a step has the same rows on any number of processes; and
a resumed run passes over as many as its steps have taken, which costs their reading but not their tokenising.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, load_dataset

from tokenseek.config import DataConfig, SourceConfig
from tokenseek.data.reading import RawRow, arrow_rows, read_file
from tokenseek.data.sources import LoadedSource, is_kept, local_files, require_column
from tokenseek.errors import UserError

# So many rows are looked at before a run starts: their columns, format and first examples.
HEAD_ROWS = 256
_BUFFER_ROWS = 10_000
_ROWS_AT_ONCE = 256


def load_head(source: SourceConfig, key: str) -> LoadedSource:
    """The first rows of a streamed source, behind its filters.

    Args:
        key: the source's dotted path in the configuration, with which errors begin.

    Raises:
        UserError: it cannot be read, lacks a column, or none of its first rows is left.
    """
    read = list(itertools.islice(_read(source, key), HEAD_ROWS))
    columns = tuple(dict.fromkeys(column for row in read for column in row.columns))
    for name, filters in (("drop", source.drop), ("keep", source.keep)):
        for column in filters:
            require_column(columns, column, f"{key}.{name}")
    kept = [row for row in read if is_kept(source, row.text)]
    if not kept:
        given = source.path or source.name
        raise UserError(f"{key}: of the first {len(read)} rows of {given} none is left; loosen its filters")
    rows = Dataset.from_dict({"row": [row.text for row in kept], "place": [row.place for row in kept]})
    note = f"{key} is streamed: this report covers its first {len(read):,} rows."
    return LoadedSource(rows, columns, len(read), (note,))


def stream_rows(data: DataConfig, section: str) -> datasets.IterableDataset:
    """The rows of a pass: `row`, `place`, the `source`'s number, and the `position` in the order of the sources."""
    rows = datasets.IterableDataset.from_generator(
        _numbered_rows, gen_kwargs={"data": data.model_dump_json(), "section": section}
    )
    return rows.shuffle(seed=data.seed, buffer_size=_BUFFER_ROWS) if data.shuffle else rows


class StreamedExamples(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Examples of a stream, each with the `visit` (number of the pass) in which it comes.

    Args:
        rows: of a pass.
        encode: a row to its example.
        part, parts: this process (or group of those that share texts) of so many.
        skip: rows that were trained on before.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        encode: Callable[[dict[str, Any]], dict[str, Any]],
        part: int = 0,
        parts: int = 1,
        skip: int = 0,
    ):
        self.rows, self.encode, self.part, self.parts, self.skip = rows, encode, part, parts, skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        mine = itertools.islice(self._passes(), self.skip + self.part, None, self.parts)
        return (self.encode(row) | {"visit": visit} for visit, row in mine)

    def _passes(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for visit in itertools.count():
            self.rows.set_epoch(visit)
            row = None
            for row in self.rows:
                yield visit, row
            if row is None:
                raise UserError("data: the stream has no row that its filters keep; give data with at least one")


def _numbered_rows(data: str, section: str) -> Iterator[dict[str, Any]]:
    config = DataConfig.model_validate_json(data)
    kept = (
        {"row": row.text, "place": row.place, "source": number}
        for number, source in enumerate(config.sources)
        for row in _read(source, f"{section}.sources.{number}")
        if is_kept(source, row.text)
    )
    for position, row in enumerate(itertools.islice(kept, config.limit)):
        yield row | {"position": position}


def _read(source: SourceConfig, key: str) -> Iterator[RawRow]:
    return _read_local(Path(source.path).expanduser(), key) if source.path is not None else _read_hub(source, key)


def _read_local(path: Path, key: str) -> Iterator[RawRow]:
    for file in local_files(path, key)[0]:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        try:
            for row in read_file(file):
                yield row._replace(place=f"{name}, {row.place}")
        except UserError as error:
            raise UserError(f"{key}.path: {error}") from error


def _read_hub(source: SourceConfig, key: str) -> Iterator[RawRow]:
    try:
        table = load_dataset(source.name, name=source.config_name, split=source.split, streaming=True)
        number = 0
        for batch in table.with_format("arrow").iter(_ROWS_AT_ONCE):
            for text in arrow_rows(batch):
                number += 1
                yield RawRow(text, f"{source.name}, row {number}", batch.column_names)
    # datasets raises its own errors, pyarrow's, the hub's and requests' for what is always one matter: unusable data.
    except Exception as error:
        raise UserError(
            f"{key}.name: cannot read the data set {source.name!r} (split {source.split!r}): {error.__cause__ or error}"
        ) from error
