"""Seeking: how important every token of a data set is to the model that is to be tuned (section 3.2.1).

Names are imported when they are first used: what scores in a training step needs none of the libraries that read data
and write the index.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenseek.seeking.batching import ScoringPlan, plan_batches
    from tokenseek.seeking.gradient import REDUCTIONS
    from tokenseek.seeking.run import SeekingProgress, Team, assigned_shards, seek, seek_abandoned, wait_for_shards
    from tokenseek.seeking.scorer import Scores, TokenScorer

_WHERE = {
    "REDUCTIONS": "tokenseek.seeking.gradient",
    "Scores": "tokenseek.seeking.scorer",
    "ScoringPlan": "tokenseek.seeking.batching",
    "SeekingProgress": "tokenseek.seeking.run",
    "Team": "tokenseek.seeking.run",
    "TokenScorer": "tokenseek.seeking.scorer",
    "assigned_shards": "tokenseek.seeking.run",
    "plan_batches": "tokenseek.seeking.batching",
    "seek": "tokenseek.seeking.run",
    "seek_abandoned": "tokenseek.seeking.run",
    "wait_for_shards": "tokenseek.seeking.run",
}
__all__ = [
    "REDUCTIONS",
    "Scores",
    "ScoringPlan",
    "SeekingProgress",
    "Team",
    "TokenScorer",
    "assigned_shards",
    "plan_batches",
    "seek",
    "seek_abandoned",
    "wait_for_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tokenseek.seeking' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
