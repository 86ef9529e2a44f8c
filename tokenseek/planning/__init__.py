"""Plan: the memory of a run, before any weight is loaded and without a GPU."""

from tokenseek.planning.budget import Choice, Knob, largest_ratio
from tokenseek.planning.engine import Engine, read_engine
from tokenseek.planning.ledger import CATEGORIES
from tokenseek.planning.step import MemoryPlan, Method, plan_memory

__all__ = [
    "CATEGORIES",
    "Choice",
    "Engine",
    "Knob",
    "MemoryPlan",
    "Method",
    "largest_ratio",
    "plan_memory",
    "read_engine",
]
