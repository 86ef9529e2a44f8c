"""`tokenseek data`: what a model would be trained on, as tokens with their labels, without its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from tokenseek.config import DataConfig, ModelConfig
from tokenseek.data import PreparedData, prepare_dataset
from tokenseek.data.packing import PackedDataset
from tokenseek.labels import IGNORED
from tokenseek.models.loading import load_tokenizer
from tokenseek.reporting import render_labels

_TOKENS_SHOWN = 400


def show_data(
    model: ModelConfig,
    data: DataConfig,
    examples: int = 3,
    *,
    packing: bool | Literal["bins"] = False,
    color: bool = False,
) -> Iterator[str]:
    """What the sources are recognised as, what becomes of them, and their first examples as tokens.

    Args:
        examples: how many to show.
        packing: `training.packing` of the run.
        color: mark labels with colours instead of brackets.

    Raises:
        UserError: as :func:`tokenseek.prepare_dataset`.
    """
    tokenizer = load_tokenizer(model, weights=False)
    prepared = prepare_dataset(data, tokenizer)
    yield from describe_data(prepared, data, packing)
    mark = "black on green" if color else "in [[ ]]"
    for row, example in enumerate(prepared.dataset.select(range(min(examples, len(prepared.dataset))))):
        ids, labels = example["input_ids"], example["labels"]
        yield (
            f"\nexample {row} ({example['example_id']}): {len(ids):,} tokens, {_learned(labels):,} with a loss ({mark})"
        )
        yield render_labels(tokenizer, ids[:_TOKENS_SHOWN], labels[:_TOKENS_SHOWN], color)
        if len(ids) > _TOKENS_SHOWN:
            left = _learned(labels) - _learned(labels[:_TOKENS_SHOWN])
            yield f"... {len(ids) - _TOKENS_SHOWN:,} more tokens, {left:,} with a loss"


def _learned(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])  # the first token is never predicted


def describe_data(prepared: PreparedData, data: DataConfig, packing: bool | Literal["bins"] = False) -> list[str]:
    """Lines about prepared data: its report, and how long and how many its examples are."""
    dataset = prepared.dataset
    lengths = sorted(len(ids) for ids in dataset["input_ids"])
    middle, longest = lengths[len(lengths) // 2], lengths[-1]
    rows = PackedDataset(dataset, data.max_length)
    laid_out = f"{len(rows):,} rows of {data.max_length:,} tokens, {rows.filled:.1%} full"
    told = (
        f"packed into {laid_out}"
        if packing == "bins"
        else f"would pack into {laid_out} (training.packing is {str(packing).lower()}; bins packs all data)"
    )
    return [
        str(prepared.report),
        f"examples: {len(dataset):,}, of {middle:,} tokens in the middle and {longest:,} at most "
        f"(max_length {data.max_length:,}); {told}",
    ]
