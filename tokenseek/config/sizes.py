"""Numbers of bytes, as people write them."""

import re

from tokenseek.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``512 MiB``, ``80GB`` (10^9) or a plain number of bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    try:
        size = int(float(found[1]) * unit) if found and unit else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise UserError(f"{text!r} is not a valid size; write 8GiB, 512MiB, 80GB or a number of bytes.")
    return size


def format_size(nbytes: int) -> str:
    """Bytes in GiB with two decimals, or in MiB with one where they are less than a GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
