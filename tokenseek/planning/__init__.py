"""Plan: the memory of a run, before any weight is loaded and without a GPU."""

from tokenseek.planning.budget import Choice, Knob, largest_ratio
from tokenseek.planning.engine import Engine, launched_engine, read_engine
from tokenseek.planning.ledger import CATEGORIES
from tokenseek.planning.report import describe_choice, plan_table
from tokenseek.planning.step import MemoryPlan, Method, method_of, plan_memory

__all__ = [
    "CATEGORIES",
    "Choice",
    "Engine",
    "Knob",
    "MemoryPlan",
    "Method",
    "describe_choice",
    "largest_ratio",
    "launched_engine",
    "method_of",
    "plan_memory",
    "plan_table",
    "read_engine",
]
