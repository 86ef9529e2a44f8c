"""Seeking: how important every token of a data set is to the model that is to be tuned (section 3.2.1)."""

from tokenseek.seeking.batching import ScoringPlan, plan_batches
from tokenseek.seeking.gradient import REDUCTIONS
from tokenseek.seeking.run import SeekingProgress, Team, assigned_shards, seek, seek_abandoned, wait_for_shards
from tokenseek.seeking.scorer import Scores, TokenScorer

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
