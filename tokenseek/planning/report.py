"""A plan in words, for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenseek.errors import UserError
from tokenseek.planning.budget import Choice
from tokenseek.planning.ledger import CATEGORIES
from tokenseek.planning.step import MemoryPlan

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``512 MiB``, ``80GB`` (10^9) or a plain number of bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    unit = found and _UNITS.get(found[2].upper())
    try:
        size = int(float(found[1]) * unit) if unit else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise UserError(f"{text!r} is no size; write 8GiB, 512MiB, 80GB or a number of bytes.")
    return size


def format_size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def plan_table(plans: Sequence[MemoryPlan]) -> str:
    """One line for each plan: the bytes of its peak, then what they are for."""
    giant = max(plan.peak for plan in plans) >= 2**30
    unit, digits = (2**30, 2) if giant else (2**20, 1)
    lines = [["GiB" if giant else "MiB", "peak", *(name.replace("keys_values", "K/V") for name in CATEGORIES)]]
    for plan in plans:
        sizes = [plan.peak, *(plan.parts[name] for name in CATEGORIES)]
        lines.append([str(plan.method), *(f"{size / unit:.{digits}f}" for size in sizes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def describe_choice(choice: Choice, budget: int) -> str:
    """What :func:`largest_ratio` found, with the way to set it."""
    size = format_size(budget)
    if choice.ratio is not None:
        return (
            f"{size}: r = {choice.ratio:g} is the largest share that fits; its peak is "
            f"{format_size(choice.plan.peak)}.\n  --set selection.ratio={choice.ratio:g}"
        )
    lines = [f"{size}: nothing fits; {choice.plan.method} needs {format_size(choice.plan.peak)}. At that share,"]
    for knob in choice.knobs:
        verdict = "fits" if knob.fits else "is not enough alone"
        lines.append(f"  {knob.how}\n    {verdict}: {format_size(knob.plan.peak)}")
    return "\n".join(lines)
