"""Plan: the memory of a run and the time of its steps, before any weight is loaded and without a GPU."""

from tokenseek.launching.engine import Engine, launched_engine, read_engine
from tokenseek.planning.budget import Choice, Knob, largest_ratio
from tokenseek.planning.ledger import CATEGORIES
from tokenseek.planning.longest import RESERVE, Lengths, LongestOfMethod, longest_by_method
from tokenseek.planning.method import Method, method_of, methods_of_lengths, methods_of_table
from tokenseek.planning.proposal import proposals
from tokenseek.planning.report import (
    describe_choice,
    describe_length,
    describe_loading,
    describe_optimizer_peak,
    describe_proposals,
    describe_training,
    longest_table,
    plan_table,
    time_table,
)
from tokenseek.planning.shapes import Shape, find_shape, known_shapes
from tokenseek.planning.step import MemoryPlan, load_model_config, plan_memory
from tokenseek.planning.work import EFFICIENCY, GPUS, REFERENCE, Gpu, StepWork, find_gpu

__all__ = [
    "CATEGORIES",
    "Choice",
    "EFFICIENCY",
    "GPUS",
    "Engine",
    "Gpu",
    "Knob",
    "Lengths",
    "LongestOfMethod",
    "MemoryPlan",
    "Method",
    "REFERENCE",
    "RESERVE",
    "Shape",
    "StepWork",
    "describe_choice",
    "describe_length",
    "describe_loading",
    "describe_optimizer_peak",
    "describe_proposals",
    "describe_training",
    "find_gpu",
    "find_shape",
    "known_shapes",
    "largest_ratio",
    "load_model_config",
    "longest_by_method",
    "longest_table",
    "launched_engine",
    "method_of",
    "methods_of_lengths",
    "methods_of_table",
    "plan_memory",
    "plan_table",
    "proposals",
    "read_engine",
    "time_table",
]
