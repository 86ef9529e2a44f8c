"""Plans as one self-contained page to turn by hand: a budget by a slider, and each step over its time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from tokenseek.planning.ledger import CATEGORIES
from tokenseek.planning.step import MemoryPlan

_COLOURS = ("#8a929c", "#b9c0c8", "#d5dae0", "#2a6fbb", "#7fb0e0", "#d9741a", "#f0c49b")


def plan_page(plans: Sequence[MemoryPlan], subtitle: str) -> str:
    """The page, in HTML without any reference to another file or host; its own policy forbids it to load anything.

    Example:
        >>> Path("plans.html").write_text(plan_page(plans, "Llama-3.1 8B"), encoding="utf-8")
    """
    data: Mapping[str, object] = {
        "categories": [name.replace("keys_values", "keys and values") for name in CATEGORIES],
        "colours": _COLOURS,
        "plans": [
            {
                "method": str(plan.method),
                "tokens": plan.tokens[0] * plan.tokens[1],
                "peak": plan.peak,
                "host": plan.host,
                "states": plan.states,
                "flops": plan.work.flops,
                "stretches": [
                    [round(stretch.seconds, 6), *(stretch.parts[name] for name in CATEGORIES)]
                    for stretch in plan.stretches
                ],
            }
            for plan in plans
        ],
    }
    # In a script, "<" could begin its end.
    page = files("tokenseek.planning").joinpath("page.html").read_text(encoding="utf-8")
    return page.replace("SUBTITLE", escape(subtitle)).replace("DATA", json.dumps(data).replace("<", "\\u003c"))
