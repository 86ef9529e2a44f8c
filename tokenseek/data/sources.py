"""Sources: loads local files and data sets of the hub, filters their rows, and draws the rows of a mixture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from datasets.utils.logging import get_logger

from tokenseek.config.schema import SourceConfig
from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean

logger = get_logger(__name__)

_BUILDER_OF_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_source(source: SourceConfig, key: str) -> tuple[Dataset, int]:
    """The rows of one source after its filters, and the number of rows read before them.

    Args:
        key: the source's dotted path in the configuration (`data.sources.0`), with which errors begin.

    Raises:
        UserError: missing or unreadable data, a missing column (lists the columns there are), or no row left.
    """
    rows = _load_local(source, key) if source.path is not None else _load_hub(source, key)
    rows_read = len(rows)
    for filter_key, filters, wanted in (("drop", source.drop, False), ("keep", source.keep, True)):
        for column, values in filters.items():
            require_column(rows, column, f"{key}.{filter_key}")
            cells = list(rows[column])
            for value in values:
                if value not in cells:
                    logger.warning("%s.%s.%s: no row holds %r", key, filter_key, column, value)
            rows = rows.select([row for row, cell in enumerate(cells) if (cell in values) == wanted])
    if not len(rows):
        filtered = f": its filters drop all {rows_read} rows" if rows_read else ""
        raise UserError(f"{key}: no rows in {source.path or source.name}{filtered}; give data with at least one row")
    return rows, rows_read


def require_column(rows: Dataset, column: str, key: str) -> None:
    if column not in rows.column_names:
        raise UserError(
            f"{key}: the data has no column {column!r}{did_you_mean(column, rows.column_names)}; "
            f"its columns are {', '.join(rows.column_names)}"
        )


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


def _load_local(source: SourceConfig, key: str) -> Dataset:
    path = Path(source.path).expanduser()
    suffixes = ", ".join(_BUILDER_OF_SUFFIX)
    if not path.exists():
        raise UserError(f"{key}.path: no file or folder {source.path!r} (working directory {Path.cwd()})")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _BUILDER_OF_SUFFIX)
        if not files:
            raise UserError(f"{key}.path: the folder {source.path!r} holds no file of the kinds {suffixes}")
    found = sorted({file.suffix for file in files})
    builders = {_BUILDER_OF_SUFFIX.get(suffix) for suffix in found}
    if len(builders) > 1 or None in builders:
        raise UserError(f"{key}.path: {source.path!r} is of kind {found}; accepted is one kind of {suffixes}")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{key}.path: {source.path!r} is empty; give data with at least one row")
    split = source.split.partition("[")[0]  # "train[:10%]" slices the split "train"
    data_files = {split: [str(file) for file in files]}
    return _load(
        key, f"{key}.path: cannot read {source.path!r}", builders.pop(), data_files=data_files, split=source.split
    )


def _load_hub(source: SourceConfig, key: str) -> Dataset:
    failure = f"{key}.name: cannot load the data set {source.name!r} (split {source.split!r})"
    return _load(key, failure, source.name, name=source.config_name, split=source.split)


def _load(key: str, failure: str, *args, **kwargs) -> Dataset:
    try:
        return load_dataset(*args, **kwargs)
    # datasets raises its own errors, pyarrow's, the hub's and requests' for what is always one matter: unusable data.
    except Exception as error:
        if "corresponds to no data" in str(error):  # a file with a header and no row
            return Dataset.from_dict({})
        raise UserError(f"{failure}: {error.__cause__ or error}") from error
