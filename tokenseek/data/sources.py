"""Sources: finds local files and data sets of the hub, reads and filters their rows, and draws those of a mixture."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, ReadInstruction, load_dataset
from datasets.table import MemoryMappedTable
from datasets.utils.logging import get_logger

from tokenseek.config import SourceConfig
from tokenseek.data.outside import converted
from tokenseek.data.reading import READERS, RawRow, arrow_rows, kind_of, parse_row, read_file
from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean

logger = get_logger(__name__)

_SCHEMA = pa.schema([("row", pa.large_string()), ("place", pa.string())])
_ROWS_AT_ONCE = 1000
# What `datasets` writes beside data.
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
_HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval"}
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class LoadedSource:
    """The rows of a source behind its filters.

    Attributes:
        rows: columns `row`, the text of a JSON object (:func:`tokenseek.data.reading.parse_row`), and `place`, where it
            stands, for errors.
        columns: names of the cells that the rows have, in the order of their first appearance.
        rows_read: number of rows before the filters.
        notes: what a user should know, such as files that were left out.
    """

    rows: Dataset
    columns: tuple[str, ...]
    rows_read: int
    notes: tuple[str, ...] = ()


def load_source(source: SourceConfig, key: str) -> LoadedSource:
    """The rows of one source after its filters, and after its `convert`.

    Args:
        key: the source's dotted path in the configuration (`data.sources.0`), with which errors begin.

    Raises:
        UserError: missing or unreadable data, a missing column (lists the columns there are), or no row left.
    """
    loaded = _load_local(source, source.path, key) if source.path is not None else _load_hub(source, key)
    rows = loaded.rows
    for filter_key, filters, wanted in (("drop", source.drop, False), ("keep", source.keep, True)):
        for column, values in filters.items():
            require_column(loaded.columns, column, f"{key}.{filter_key}")
            cells = [parse_row(row).get(column) for row in rows["row"]]
            for value in values:
                if not any(_is_meant(cell, value) for cell in cells):
                    logger.warning("%s.%s.%s: no row holds %r", key, filter_key, column, value)
            rows = rows.select(
                [row for row, cell in enumerate(cells) if any(_is_meant(cell, v) for v in values) == wanted]
            )
    if not len(rows):
        filtered = f": its filters drop all {loaded.rows_read} rows" if loaded.rows_read else ""
        raise UserError(f"{key}: no rows in {source.path or source.name}{filtered}; give data with at least one row")
    if source.convert:
        rows, columns = converted(rows, source.convert, key)
        return LoadedSource(rows, columns, loaded.rows_read, loaded.notes)
    return LoadedSource(rows, loaded.columns, loaded.rows_read, loaded.notes)


def require_column(columns: Sequence[str], column: str, key: str, read: Collection[str] = ()) -> None:
    """Raise UserError unless `column`, which the setting `key` names, is among `columns`.

    Args:
        read: columns that other settings name, of which none was meant. Where one other is left, it was.
    """
    if column in columns:
        return
    left = [name for name in columns if name not in read]
    meant = did_you_mean(column, left) or (f"; did you mean {left[0]}?" if len(left) == 1 < len(columns) else "")
    raise UserError(f"{key}: the data has no column {column!r}{meant}; its columns are {', '.join(columns)}")


def draw_rows(sources: Sequence[SourceConfig], sizes: Sequence[int], key: str) -> list[np.ndarray]:
    """The rows that each source adds to the mixture, ascending.

    A source adds all its rows, or `rows` of them. Sources with weights add the largest numbers of rows in the ratio of
    their weights that the smallest of them can serve without repeating a row.

    Args:
        sizes: number of rows of each source.
        key: dotted path of the list of sources.
    """
    per_weight = min((size / s.weight for s, size in zip(sources, sizes, strict=True) if s.weight), default=0.0)
    drawn = []
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        count = source.rows or size
        if source.weight is not None:
            count = max(1, min(size, round(source.weight * per_weight)))
        if count > size:
            raise UserError(f"{key}.{number}.rows: {count} rows asked for, but the source has {size} after its filters")
        chosen = np.random.Generator(np.random.Philox(source.seed)).choice(size, count, replace=False, shuffle=False)
        drawn.append(np.sort(chosen))
    return drawn


def local_files(path: Path, key: str) -> tuple[list[Path], list[Path]]:
    """The files that a path stands for, and those among them that are not read.

    Not read are hidden files (of notebooks and file systems), and what `datasets` writes about a data set.

    Raises:
        UserError: there is none, they are of several kinds, or one is a link to nothing.
    """
    suffixes = ", ".join(READERS)
    if not path.exists():
        raise UserError(f"{key}.path: no file or folder {str(path)!r} (working directory {Path.cwd()})")
    if not path.is_dir():
        files, hidden = [path], []
    else:
        found = sorted(file for file in path.rglob("*") if kind_of(file) in READERS and not file.is_dir())
        if lost := [file for file in found if not file.exists()]:
            raise UserError(f"{key}.path: {lost[0]} is a link to nothing; fetch its file, or remove the link")
        if (path / "state.json").is_file() and any(path.glob("*.arrow")):
            raise UserError(
                f"{key}.path: {str(path)!r} was written by save_to_disk of datasets, for its own use. Write it as a "
                f"file: datasets.load_from_disk({str(path)!r}).to_parquet('train.parquet')"
            )
        hidden = [file for file in found if _is_hidden(file.relative_to(path)) or file.name in _DESCRIPTIONS]
        files = [file for file in found if file not in set(hidden)]
        if not files:
            only = f" that is not hidden ({len(hidden)} are)" if hidden else ""
            raise UserError(f"{key}.path: the folder {str(path)!r} holds no file of the kinds {suffixes}{only}")
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1 or kinds[0] not in READERS:
        raise UserError(
            f"{key}.path: {str(path)!r} is of kind {kinds}; accepted is one kind of {suffixes}, text also as .gz"
        )
    return files, hidden


def _like_held_out(names: Sequence[str]) -> list[str]:
    """Those of several files that are named as held-out data usually is, if not all are."""
    held_out = [name for name in names if _HELD_OUT & set(re.split(r"[^a-z]+", name.lower()))]
    return held_out if len(held_out) < len(names) else []


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def is_kept(source: SourceConfig, row: str) -> bool:
    """Whether the filters of a source keep a row, the text of a JSON object."""
    if not source.drop and not source.keep:
        return True
    cells = parse_row(row)

    def is_named(column: str, values: Sequence[Any]) -> bool:
        return any(_is_meant(cells.get(column), value) for value in values)

    dropped = any(is_named(column, values) for column, values in source.drop.items())
    return not dropped and all(is_named(column, values) for column, values in source.keep.items())


def _is_meant(cell: Any, value: Any) -> bool:
    """Whether a cell is what a filter names. Where one of them is text, as all cells of a CSV are, texts decide."""
    if isinstance(cell, bool) or isinstance(value, bool):
        return str(cell).lower() == str(value).lower()
    if isinstance(cell, str) != isinstance(value, str) and None not in (cell, value):
        return str(cell) == str(value)
    return bool(cell == value)


def _load_local(source: SourceConfig, given: str, key: str) -> LoadedSource:
    path = Path(given).expanduser()
    files, hidden = local_files(path, key)
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{key}.path: {given!r} is empty; give data with at least one row")
    names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]

    def read() -> Iterable[RawRow]:
        for file, name in zip(files, names, strict=True):
            for row in read_file(file):
                yield row._replace(place=f"{name}, {row.place}")

    try:
        content = [_content_digest(file) for file in files]
        rows, columns = _cached(read, [given, *names, *content])
    except UserError as error:
        raise UserError(f"{key}.path: {error}") from error
    except OSError as error:
        raise UserError(f"{key}.path: cannot read {given!r}: {error}") from error
    notes = []
    if hidden:
        some = ", ".join(str(file.relative_to(path)) for file in hidden[:3]) + (", ..." if len(hidden) > 3 else "")
        notes.append(
            f"{key}.path: {len(hidden)} file(s) of {given!r} are left out, hidden or descriptions of data: {some}"
        )
    if held_out := _like_held_out(names):
        notes.append(
            f"WARNING: {key}.path: {given!r} stands for {len(names)} files, all of which are read; "
            f"{', '.join(held_out[:3])} is named like held-out data. Give one file, or move the others"
        )
    rows = _sliced(rows, source.split, f"{key}.split")
    return LoadedSource(rows, columns, len(rows), tuple(notes))


def _load_hub(source: SourceConfig, key: str) -> LoadedSource:
    try:
        table = load_dataset(source.name, name=source.config_name, split=source.split)
    # datasets raises its own errors, pyarrow's, the hub's and requests' for what is always one matter: unusable data.
    except Exception as error:
        raise UserError(
            f"{key}.name: cannot load the data set {source.name!r} (split {source.split!r}): {error.__cause__ or error}"
        ) from error

    def read() -> Iterable[RawRow]:
        number = 0
        for batch in table.with_format("arrow").iter(_ROWS_AT_ONCE):
            for text in arrow_rows(batch):
                number += 1
                yield RawRow(text, f"{source.name}, row {number}", table.column_names)

    rows, columns = _cached(read, ["hub", str(source.name), table._fingerprint])
    return LoadedSource(rows, columns or tuple(table.column_names), len(rows))


def _sliced(rows: Dataset, split: str, key: str) -> Dataset:
    """The rows of `train[:10%]`; a local path has one split, whatever its name is."""
    name = split.partition("[")[0]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (AssertionError, ValueError) as error:
        raise UserError(f"{key}: {split!r} is not a split such as train or train[:10%]: {error}") from error
    return rows.select([row for part in parts for row in range(*slice(part.from_, part.to).indices(len(rows)))])


def _content_digest(file: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _cached(read: Callable[[], Iterable[RawRow]], identity: list[str]) -> tuple[Dataset, tuple[str, ...]]:
    """The rows that `read` yields, as a memory-mapped data set, and their columns.

    They are read once for an `identity`, which names the content and not the time of a file, and for this package's
    code. Processes may do so at once: the folder appears whole or not at all.
    """
    code = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("reading.py", "sources.py")]
    key = hashlib.blake2b(json.dumps([identity, code]).encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tokenseek" / key
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder.parent))
            try:
                _write_rows(read(), new)
                os.replace(new, folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        except OSError as error:
            if not folder.exists():  # else another process has finished it
                raise cache_error(error) from error
    rows = Dataset(MemoryMappedTable.from_file(str(folder / "rows.arrow")), fingerprint=key)
    return rows, tuple(json.loads((folder / "columns.json").read_text(encoding="utf-8")))


def cache_error(error: OSError) -> UserError:
    """The error where prepared data cannot be written, such as on a full disk."""
    return UserError(
        f"prepared data cannot be kept in {datasets.config.HF_DATASETS_CACHE}: {error.strerror or error}; make "
        "room there, or name another folder in the environment variable HF_DATASETS_CACHE"
    )


def _write_rows(rows: Iterable[RawRow], folder: Path) -> None:
    columns: dict[str, None] = {}
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        waiting: list[RawRow] = []

        def write() -> None:
            cells = [row.text for row in waiting], [row.place for row in waiting]
            arrays = [pa.array(column, kind) for column, kind in zip(cells, _SCHEMA.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            waiting.clear()

        for row in rows:
            columns.update(dict.fromkeys(row.columns))
            waiting.append(row)
            if len(waiting) == _ROWS_AT_ONCE:
                write()
        write()
    (folder / "columns.json").write_text(json.dumps(list(columns)), encoding="utf-8")
