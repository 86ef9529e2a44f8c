"""Sequence parallelism: long examples over several ranks, with the token layout chosen once."""

from tokenseek.launching.sequence import sequence_group
from tokenseek.parallel.sequence import disable_sequence_parallelism, enable_sequence_parallelism, shared_by
from tokenseek.ulysses.all_to_all import Traffic, measured

__all__ = [
    "Traffic",
    "disable_sequence_parallelism",
    "enable_sequence_parallelism",
    "measured",
    "sequence_group",
    "shared_by",
]
