"""Which tokens of an example are tuned: pure functions of its scores and of keyed draws.

:mod:`tokenseek.selection.batched`, which alone needs torch, selects in a batch whose scores were just made.
"""

from tokenseek.selection.contract import Candidates, Definition
from tokenseek.selection.outside import rule_named
from tokenseek.selection.rules import Top
from tokenseek.selection.scores import combine_scores
from tokenseek.selection.select import select_positions, select_weighted, supervised_positions
from tokenseek.selection.settings import SelectionRule

__all__ = [
    "Candidates",
    "Definition",
    "SelectionRule",
    "Top",
    "combine_scores",
    "rule_named",
    "select_positions",
    "select_weighted",
    "supervised_positions",
]
