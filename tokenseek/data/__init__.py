"""Data: from files and data sets of the hub to token ids, labels and stable example ids."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from tokenseek.config.schema import DataConfig, SourceConfig
from tokenseek.data.encoding import (
    digest,
    encode_batch,
    eos_to_append,
    template_fingerprint,
    tokenizer_fingerprint,
)
from tokenseek.data.sources import draw_rows, load_source, require_column
from tokenseek.data.templates import Rendered, render_chat, render_instruction, render_text
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED

__all__ = ["DataReport", "PreparedData", "hold_out", "prepare_dataset"]

_RENDERED = Features(
    {"text": Value("string"), "spans": List(List(Value("int32"))), "add_special_tokens": Value("bool")}
)
_ENCODED = Features(
    {
        "example_id": Value("string"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "num_cut": Value("int64"),
    }
)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. Tokens count after truncation."""

    rows_read: int
    rows_filtered: int
    examples: int
    truncated_examples: int
    tokens_cut: int
    unsupervised_examples: int
    tokens: int
    supervised_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.rows_read:,} rows read, {self.rows_filtered:,} dropped by filters, {self.examples:,} examples "
            f"prepared: {self.tokens:,} tokens, {self.supervised_tokens:,} of them with a loss. "
            f"{self.truncated_examples:,} examples were longer than max_length and lost {self.tokens_cut:,} tokens. "
            f"{self.unsupervised_examples:,} examples have no token with a loss: they are scored and add nothing to "
            "the training loss."
        )


@dataclass(frozen=True)
class PreparedData:
    """A tokenised data set with the columns `example_id`, `input_ids` and `labels`, in data order.

    `fingerprints` (tokenizer, template, data, max_length, labels) change whenever the tokens or labels would.
    """

    dataset: Dataset
    fingerprints: dict[str, str | int]
    report: DataReport


def prepare_dataset(data: DataConfig, tokenizer: Any, section: str = "data") -> PreparedData:
    """Loads, filters, mixes, renders and tokenises the sources of a configuration.

    The result depends on the configuration, the data and the tokenizer only. It is cached on disk by `datasets`, so
    that the processes of a run can share it when the main one comes first.

    Args:
        section: `data` or `eval_data`, for the dotted paths in errors.

    Raises:
        UserError: names the source (and row) at fault.
    """
    for number, source in enumerate(data.sources):
        if source.kind == "chat" and not tokenizer.chat_template:
            raise UserError(
                f"{section}.sources.{number}.kind: chat needs a tokenizer with a chat template; use the one of an "
                "instruction-tuned model"
            )
    eos = eos_to_append(tokenizer, data.append_eos)
    tokenizer_digest = tokenizer_fingerprint(tokenizer)
    template_digest = template_fingerprint(tokenizer, data.template, data.append_eos, (s.kind for s in data.sources))

    loaded = [load_source(source, f"{section}.sources.{number}") for number, source in enumerate(data.sources)]
    drawn = draw_rows(data.sources, [len(rows) for rows, _ in loaded], f"{section}.sources")
    rendered = []
    for number, (source, (rows, _), chosen) in enumerate(zip(data.sources, loaded, drawn, strict=True)):
        key = f"{section}.sources.{number}"
        rows = rows.select(chosen)
        rendered.append(
            _map(
                rows,
                _render_rows(source, rows, data.template, eos, tokenizer, key),
                [source.model_dump_json(), eos, tokenizer_digest, template_digest],
                features=_RENDERED,
                desc=f"render {key}",
                num_proc=data.num_proc,
            )
        )
    examples = concatenate_datasets(rendered)
    if data.shuffle:
        examples = examples.shuffle(seed=data.seed)
    if data.limit is not None:
        examples = examples.select(range(min(data.limit, len(examples))))
    examples = _map(
        examples,
        encode_batch,
        [tokenizer_digest, str(data.max_length), data.labels],
        features=_ENCODED,
        desc=f"tokenise {section}",
        num_proc=data.num_proc,
        fn_kwargs={"tokenizer": tokenizer, "max_length": data.max_length, "labels": data.labels},
    )
    fingerprints = {
        "tokenizer": tokenizer_digest,
        "template": template_digest,
        "data": digest(*examples["example_id"]),
        "max_length": data.max_length,
        "labels": data.labels,
    }
    rows_read = sum(count for _, count in loaded)
    report = _report(examples, rows_read, rows_read - sum(len(rows) for rows, _ in loaded))
    return PreparedData(examples.remove_columns("num_cut"), fingerprints, report)


def hold_out(dataset: Dataset, examples: int, seed: int) -> tuple[Dataset, Dataset]:
    """A data set without `examples` of its rows, drawn with `seed`, and these rows; both keep its order.

    Raises:
        UserError: too few rows would remain.
    """
    if not 0 < examples < len(dataset):
        raise UserError(
            f"data.hold_out is {examples}, and there are {len(dataset)} examples; accepted are 1 to {len(dataset) - 1}"
        )
    drawn = np.zeros(len(dataset), bool)
    drawn[np.random.default_rng(seed).permutation(len(dataset))[:examples]] = True
    return dataset.select(np.flatnonzero(~drawn)), dataset.select(np.flatnonzero(drawn))


def _render_rows(
    source: SourceConfig, rows: Dataset, template: str, eos: str, tokenizer: Any, key: str
) -> Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]:
    """The batched function that renders the rows of one source, after a look at its columns."""
    columns = source.columns

    def text_of(row: dict[str, Any], column: str, number: int) -> str:
        value = row[column]
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise UserError(
            f"{key}, row {number} after filters: column {column!r} holds {value!r}; accepted is text "
            f"(drop rows without a value with {key}.drop: {{{column}: [null]}})"
        )

    needed = {"instruction": ["instruction", "response"], "chat": ["messages"], "text": ["text"]}[source.kind]
    input_column = columns.input
    if source.kind == "instruction":
        if input_column is not None:
            needed.append("input")
        elif "input" in rows.column_names:
            input_column = "input"
    for name in needed:
        require_column(rows, getattr(columns, name), f"{key}.columns.{name}")

    def render(row: dict[str, Any], number: int) -> Rendered:
        if source.kind == "text":
            return render_text(text_of(row, columns.text, number), eos)
        if source.kind == "chat":
            messages = row[columns.messages]
            if not isinstance(messages, list):
                raise UserError(
                    f"{key}, row {number} after filters: column {columns.messages!r} holds no list of messages"
                )
            try:
                return render_chat(tokenizer, messages)
            except UserError as error:
                raise UserError(f"{key}, row {number} after filters: {error}") from error
        # An empty or missing input is Alpaca's way to say that there is none.
        given_input = text_of(row, input_column, number) if input_column and row[input_column] is not None else ""
        instruction = text_of(row, columns.instruction, number)
        return render_instruction(template, instruction, given_input, text_of(row, columns.response, number), eos)

    def render_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        names = list(batch)
        done = [
            render(dict(zip(names, cells, strict=True)), number)
            for number, cells in zip(numbers, zip(*batch.values(), strict=True), strict=True)
        ]
        return {
            "text": [item.text for item in done],
            "spans": [item.spans for item in done],
            "add_special_tokens": [item.add_special_tokens for item in done],
        }

    return render_batch


def _map(rows: Dataset, function: Callable, inputs: list[str], **options) -> Dataset:
    """`Dataset.map` whose cache is keyed by the data, `inputs` and the code of this package.

    The default key pickles the function with its tokenizer: it misses edits in imported modules, and a tokenizer's
    pickle changes as it is used.
    """
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return rows.map(
        function,
        with_indices=True,
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint=digest(rows._fingerprint, json.dumps(inputs), *code),
        **options,
    )


def _report(examples: Dataset, rows_read: int, rows_filtered: int) -> DataReport:
    cut = np.asarray(examples["num_cut"])
    lengths, supervised = [], []
    for batch in examples.select_columns("labels").with_format("arrow").iter(1000):
        for labels in batch["labels"]:
            labels = labels.values.to_numpy()
            lengths.append(len(labels))
            supervised.append(int((labels[1:] != IGNORED).sum()))  # the first token is never predicted
    return DataReport(
        rows_read=rows_read,
        rows_filtered=rows_filtered,
        examples=len(examples),
        truncated_examples=int((cut > 0).sum()),
        tokens_cut=int(cut.sum()),
        unsupervised_examples=supervised.count(0),
        tokens=sum(lengths),
        supervised_tokens=sum(supervised),
    )
