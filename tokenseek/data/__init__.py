"""Data: from files and data sets of the hub to token ids, labels and stable example ids."""

from tokenseek.data.formats import Format, recognise
from tokenseek.data.preparation import DataReport, PreparedData, hold_out, prepare_dataset, require_supervised

__all__ = ["DataReport", "Format", "PreparedData", "hold_out", "prepare_dataset", "recognise", "require_supervised"]
