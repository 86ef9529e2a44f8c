"""Reading: the rows of local files and of Arrow tables, with every cell as the file writes it.

Libraries of tables guess types: `00501` becomes a number, `NA` a missing value, and a column in which one number has a
point gives points to all others. Training text must not change on the way, so rows are read here. Each becomes the text
of one JSON object, which can hold any nesting, needs no types shared with other rows, and keeps numbers as written:
:func:`parse_row` gives them back as such.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tokenseek.errors import UserError

_MAX_INT_DIGITS = 4000  # Python refuses to turn more of them into an int


class RawRow(NamedTuple):
    """One row: the text of a JSON object, where it stands in its file (`line 3`), and the names of its cells."""

    text: str
    place: str
    columns: Iterable[str]


class WrittenFloat(float):
    """A float whose `str` is what the file has (`3.10`, `1e5`)."""

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


def parse_row(text: str) -> Any:
    """A JSON text with its numbers as written, and NaN as the missing value that it stands for.

    Raises:
        ValueError: not JSON.
    """
    return _DECODER.decode(text)


def read_file(path: Path) -> Iterator[RawRow]:
    """The rows of a file of one of the kinds of `READERS`, perhaps compressed by gzip.

    Raises:
        UserError: names the file, the line and the cause.
    """
    try:
        yield from READERS[kind_of(path)](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is cut off or damaged: {error}; fetch it again") from error


def kind_of(path: Path) -> str:
    """Which of `READERS` reads a file: its suffix in small letters, for text without the `.gz` of gzip."""
    name = path.name.lower()
    kind = Path(name.removesuffix(_GZIP)).suffix
    return f"{kind}{_GZIP}" if name.endswith(_GZIP) and kind not in _COMPRESSED else kind


def arrow_rows(table: pa.Table | pa.RecordBatch) -> Iterator[str]:
    """The rows of a table as texts of JSON objects.

    Arrow gives all structs of a column the same fields; those that are null below the top level are left out, since
    most of them are in no row's own data.
    """
    columns = [_cells(table.column(number)) for number in range(table.num_columns)]
    for cells in zip(*columns, strict=True):
        yield _dump(dict(zip(table.schema.names, cells, strict=True)))


def _int(written: str) -> int | float | str:
    if len(written) > _MAX_INT_DIGITS:
        return written
    return WrittenFloat(written) if written == "-0" else int(written)


def _constant(written: str) -> None:
    if written != "NaN":
        raise ValueError(f"{written} is not a JSON value")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError(f"an object has {_repeated([name for name, _ in pairs])} more than once")
    return members


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


_DECODER = json.JSONDecoder(
    parse_float=WrittenFloat, parse_int=_int, parse_constant=_constant, object_pairs_hook=_members
)


def _dump(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            place = f"line {number}"
            text = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path, number)
            if text.lstrip().startswith("["):
                raise UserError(
                    f"{path}, {place}: a row is a JSON object with named columns, and a list begins here. A file that "
                    'is one list of objects is named .json; a conversation is written as {"messages": [...]}'
                )
            if text.strip():
                row = _object(_parsed(text, path, place), path, place)
                yield RawRow(text.strip(), place, row)


def _read_json(path: Path) -> Iterator[RawRow]:
    """A list of objects, one object on each line, or one in all."""
    with _open(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(content.split(b"\n")[line - 1], path, line) from error
    position = _past_space(text, 0)
    if not text.startswith("[", position):
        if (only := _only_object(text, position)) is not None:
            _refuse_table(only, path)
            yield RawRow(text.strip(), "the only object", only)
        else:
            yield from _read_json_lines(path)
        return
    position, number = _past_space(text, position + 1), 0
    while not text.startswith("]", position):
        place = f"row {number + 1}"
        try:
            row, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, {place}: not valid JSON: {error}") from error
        yield RawRow(text[position:end], place, _object(row, path, place))
        number, position = number + 1, _past_space(text, end)
        if text.startswith(",", position):
            position = _past_space(text, position + 1)
        elif not text.startswith("]", position):
            raise UserError(f"{path}, behind {place}: not valid JSON: ',' or ']' is expected; is the file cut off?")
    if _past_space(text, position + 1) != len(text):
        raise UserError(f"{path}: not valid JSON: there is text behind the list of rows")


def _only_object(text: str, position: int) -> dict[str, Any] | None:
    """The object that a text is in all; None if it is none, or another follows."""
    try:
        row, end = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _past_space(text, end) == len(text) else None


def _refuse_table(row: dict[str, Any], path: Path) -> None:
    """Refuse one object that holds all rows: as a list under a name, or as a list of cells for each column."""
    lists = {name: value for name, value in row.items() if isinstance(value, list) and value}
    of_rows = [name for name, value in lists.items() if _are_rows(value)]
    if of_rows:
        name = of_rows[0]
        raise UserError(
            f"{path}: one object, whose {name!r} is a list of {len(lists[name])} objects; rows are a list of objects, "
            f"or one on each line: take that list out, with `jq '.[\"{name}\"]' FILE > rows.json` for example"
        )
    if len(lists) == len(row) > 1 and len({len(value) for value in lists.values()}) == 1:
        raise UserError(
            f"{path}: one object with a list of cells for each column ({', '.join(row)}); rows are a list of objects, "
            "or one on each line. Pandas writes them with to_json(..., orient='records', lines=True)"
        )


def _are_rows(items: list[Any]) -> bool:
    """Objects that are neither messages nor descriptions of tools."""
    return all(isinstance(item, dict) and not {"role", "from", "function"} & item.keys() for item in items)


def _read_csv(path: Path) -> Iterator[RawRow]:
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            header = next(reader, [])
            if len(header) == 1 and (other := next((sign for sign in ",;\t" if sign in header[0]), None)):
                raise UserError(
                    f"{path}: the header is one column, {header[0]!r}, whose names seem to be parted by {other!r}; "
                    f"{kind_of(path)} files are read with {delimiter!r}: save it so (.tsv for tabs), or rename the "
                    "column"
                )
            if repeated := _repeated(header):
                raise UserError(f"{path}: columns {repeated} stand in the header more than once; rename them")
            for cells in reader:
                if len(cells) > len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells in a table of {len(header)} columns; put "
                        f'texts that hold {delimiter!r} between double quotes (")'
                    )
                if cells:  # a blank cell is a missing value, as is one that the row lacks
                    values = [cell or None for cell in cells] + [None] * (len(header) - len(cells))
                    row = dict(zip(header, values, strict=True))
                    yield RawRow(_dump(row), f"line {reader.line_num}", header)
    except UnicodeDecodeError as error:
        with _open(path) as binary:
            for number, line in enumerate(binary, 1):
                _decoded(line, path, number)
        raise UserError(f"{path}: not UTF-8: {error}") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            if repeated := _repeated(file.schema_arrow.names):
                raise UserError(f"{path}: there are several columns of the name {repeated}; rename them")
            for batch in file.iter_batches(batch_size=1000):
                for text in arrow_rows(batch):
                    number += 1
                    yield RawRow(text, f"row {number}", batch.schema.names)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}") from error


_GZIP = ".gz"
_COMPRESSED = (".json", ".jsonl", ".csv", ".tsv")  # Parquet files compress their own columns
# Which function reads the files of a suffix.
READERS = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.name.lower().endswith(_GZIP) else path.open("rb")


def _past_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parsed(text: str, path: Path, place: str) -> Any:
    try:
        return parse_row(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, {place}: not valid JSON: {error}; accepted are one object on each line"
            + (", or a list of objects" if kind_of(path) == ".json" else "")
        ) from error


def _object(row: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {place}: a row is a JSON object with named columns, got {_short(row)}")
    return row


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(line, path, number) from error


def _not_utf8(line: bytes, path: Path, number: int) -> UserError:
    """Says which encoding the line is probably in: UTF-16 begins with its mark, cp1252 is what Windows writes."""
    encoding = "latin-1"
    if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        try:
            line.decode("cp1252")
            encoding = "cp1252"
        except UnicodeDecodeError:
            pass  # one of the five bytes that cp1252 leaves free
    try:
        line.decode()
    except UnicodeDecodeError as error:
        byte, column = line[error.start], error.start + 1
    return UserError(
        f"{path}, line {number}: not UTF-8 (byte 0x{byte:02x} at column {column}); it looks like {encoding}: convert "
        f"the file with `iconv -f {encoding} -t utf-8`"
    )


def _cells(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Cells as what JSON can hold: float32 in its own shortest digits, times and decimals as text, NaN as None."""
    kind = array.type
    if isinstance(array, pa.ChunkedArray):
        return [cell for chunk in array.chunks for cell in _cells(chunk)]
    if isinstance(array, pa.ExtensionArray):
        return _cells(array.storage)
    if pa.types.is_dictionary(kind):
        return _cells(array.dictionary_decode())
    if pa.types.is_floating(kind):
        written = {16: np.float16, 32: np.float32, 64: np.float64}[kind.bit_width]
        return [None if cell is None else _float(written(cell)) for cell in array.to_pylist()]
    if pa.types.is_struct(kind):
        fields = [_cells(field) for field in array.flatten()]
        names = [kind.field(number).name for number in range(kind.num_fields)]
        whole = zip(*fields, strict=True) if fields else [()] * len(array)
        return [
            {name: cell for name, cell in zip(names, cells, strict=True) if cell is not None} if valid else None
            for cells, valid in zip(whole, array.is_valid().to_pylist(), strict=True)
        ]
    if pa.types.is_map(kind):
        return [
            None if pairs is None else {str(name): _plain(cell) for name, cell in pairs} for pairs in array.to_pylist()
        ]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = array.value_lengths().to_pylist()
        values, lists, start = _cells(array.flatten()), [], 0
        for length in lengths:
            lists.append(None if length is None else values[start : start + length])
            start += length or 0
        return lists
    return [_plain(cell) for cell in array.to_pylist()]


def _float(number: np.floating) -> float | str | None:
    if np.isnan(number):
        return None
    return float(str(number)) if np.isfinite(number) else str(number)


def _plain(cell: Any) -> Any:
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            return {"bytes": len(cell)}  # an image or a sound: no text, which who asks for it is told
    if hasattr(cell, "isoformat"):
        return cell.isoformat()
    return cell if cell is None or isinstance(cell, str | int | float | bool | list | dict) else str(cell)
