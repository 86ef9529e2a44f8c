"""Data: from files and data sets of the hub to token ids, labels and stable example ids."""

from tokenseek.data.formats import Format, recognise
from tokenseek.data.preparation import (
    PreparedData,
    hold_out,
    prepare_dataset,
    require_supervised,
    stream_examples,
)
from tokenseek.data.report import DataReport
from tokenseek.data.streaming import StreamedExamples

__all__ = [
    "DataReport",
    "Format",
    "PreparedData",
    "StreamedExamples",
    "hold_out",
    "prepare_dataset",
    "recognise",
    "require_supervised",
    "stream_examples",
]
