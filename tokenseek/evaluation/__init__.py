"""Evaluate: from a model and an adapter to a row of the paper's tables, with lm-evaluation-harness.

Names are imported when they are first used: the command line checks its arguments before torch is imported.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "BENCHMARKS": "tokenseek.evaluation.benchmarks",
    "TABLE_1": "tokenseek.evaluation.benchmarks",
    "EvaluationResult": "tokenseek.evaluation.result",
    "Score": "tokenseek.evaluation.result",
    "evaluate": "tokenseek.evaluation.run",
    "markdown_table": "tokenseek.evaluation.result",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tokenseek.evaluation' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
