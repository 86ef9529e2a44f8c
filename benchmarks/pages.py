"""Tables that a benchmark writes into a page of the documentation."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"


def write_into(page: Path, text: str) -> None:
    """Put the table between the two marks of a page.

    Raises:
        SystemExit: it has none.
    """
    head, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    if not found or END not in rest:
        raise SystemExit(f"{page} has no lines {BEGIN.strip()} and {END}")
    page.write_text(f"{head}{BEGIN}{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
