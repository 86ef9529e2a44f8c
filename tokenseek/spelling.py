"""One way to answer an unknown name: what exists, and what was probably meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, accepted: Iterable[str]) -> str:
    """`'; did you mean X?'`, or nothing when no accepted name is close to the given one."""
    by_lower = {name.lower(): name for name in accepted}
    close = difflib.get_close_matches(str(given).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""
