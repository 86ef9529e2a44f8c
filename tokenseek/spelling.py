"""One way to answer an unknown name: what exists, and what was probably meant."""

import difflib
from collections.abc import Iterable


def nearest(given: object, accepted: Iterable[str]) -> str | None:
    """The accepted name that is close to the given one, in whatever case; None where none is."""
    by_lower = {name.lower(): name for name in accepted}
    close = difflib.get_close_matches(str(given).lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def did_you_mean(given: object, accepted: Iterable[str]) -> str:
    """`'; did you mean X?'`, or nothing when no accepted name is close to the given one."""
    name = nearest(given, accepted)
    return f"; did you mean {name}?" if name else ""
