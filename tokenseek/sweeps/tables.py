"""Tables of a sweep's rows: rows that differ in their seed alone are one line, with mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenseek.sweeps.sweep import Row


@dataclass(frozen=True)
class Group:
    """Rows of one setting."""

    values: tuple[Any, ...]
    rows: list[Row]

    @property
    def error(self) -> str | None:
        """That of the first of its runs that has failed; None where all went well."""
        return next((row["error"] for row in self.rows if "error" in row), None)

    def mean(self, column: str) -> float | None:
        """None where a row lacks the column."""
        numbers = self.numbers(column)
        return statistics.mean(numbers) if numbers else None

    def numbers(self, column: str) -> list[float]:
        """Those of a column, one of each run; none where some run has none."""
        numbers = [row[column] for row in self.rows if row.get(column) is not None]
        return numbers if len(numbers) == len(self.rows) else []

    def spread(self, column: str, digits: int = 4) -> str:
        """Mean, and least to greatest where there are several; the error where a row has none."""
        numbers = self.numbers(column)
        if not numbers:
            return self.error or ""
        mean = f"{statistics.mean(numbers):.{digits}f}"
        return mean if len(numbers) == 1 else f"{mean} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def grouped(rows: Iterable[Row], *columns: str) -> list[Group]:
    """Rows by their values in some columns, in the order of the first of each."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return [Group(values, rows) for values, rows in groups.items()]


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the columns behind the first are numbers and stand on the right."""
    head = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def gibibytes(size: float | None) -> str:
    """Bytes in GiB; empty where they were not measured."""
    return "" if size is None else f"{size / 2**30:.2f} GiB"
