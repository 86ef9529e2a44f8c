"""Preparation: from a configuration to token ids, labels and stable example ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from tokenseek.config import DataConfig, SourceConfig
from tokenseek.data.chat import ChatRenderer
from tokenseek.data.encoding import (
    Encoder,
    digest,
    encode_batch,
    require_usable,
    row_of,
    template_fingerprint,
    tokenizer_fingerprint,
)
from tokenseek.data.formats import recognise_rows
from tokenseek.data.reading import parse_row
from tokenseek.data.rows import RowRenderer, settled_template
from tokenseek.data.sources import LoadedSource, draw_rows, load_source
from tokenseek.data.templates import Ends
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED

# A row is a list of examples: one, or several where turns of a conversation are trained separately.
_RENDERED = Features(
    {
        "place": Value("string"),
        "left_out": Value("string"),
        "text": List(Value("large_string")),
        "spans": List(List(List(Value("int32")))),
        "add_special_tokens": List(Value("bool")),
    }
)
_ENCODED = Features(
    {
        "example_id": Value("string"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "num_cut": Value("int64"),
        "num_unread": Value("int64"),
    }
)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. Tokens count after truncation.

    Attributes:
        characters_cut: of texts so long that their end was not even tokenised; their tokens are not in `tokens_cut`.
        sources: what each source is, for people.
        template: what renders the rows, for people.
        notes: what else a user should know, such as files that were left out.
    """

    rows_read: int
    rows_filtered: int
    examples: int
    truncated_examples: int
    tokens_cut: int
    unsupervised_examples: int
    tokens: int
    supervised_tokens: int
    characters_cut: int = 0
    sources: tuple[str, ...] = ()
    template: str = ""
    notes: tuple[str, ...] = ()

    @property
    def supervised_share(self) -> float:
        """Tokens with a loss among all tokens."""
        return self.supervised_tokens / self.tokens

    def __str__(self) -> str:
        unread = f" and {self.characters_cut:,} characters that were not tokenised" if self.characters_cut else ""
        report = (
            f"{self.rows_read:,} rows read, {self.rows_filtered:,} dropped by filters, {self.examples:,} examples "
            f"prepared: {self.tokens:,} tokens, {self.supervised_tokens:,} of them with a loss. "
            f"{self.truncated_examples:,} examples were longer than max_length and lost {self.tokens_cut:,} tokens"
            f"{unread}. {self.unsupervised_examples:,} examples have no token with a loss: they are scored and add "
            "nothing to the training loss."
        )
        return "\n".join([report, *self.notes])


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
        UserError: names the source, the file and the row at fault.
    """
    require_usable(tokenizer, data.append_eos)
    loaded = [load_source(source, f"{section}.sources.{number}") for number, source in enumerate(data.sources)]
    sources, described = _settled_sources(data.sources, loaded, section)
    template = settled_template(data, tokenizer)
    by_chat_template = _rendered_by_chat_template(sources, loaded, template)
    if by_chat_template and not tokenizer.chat_template:
        number = by_chat_template[0]
        raise UserError(
            f"{section}.sources.{number}: rows of kind {sources[number].kind} need a tokenizer with a chat template "
            "here; use the one of an instruction-tuned model"
            + (f", or {section}.template=alpaca" if sources[number].kind == "instruction" else "")
        )
    tokenizer_digest = tokenizer_fingerprint(tokenizer)
    template_digest = template_fingerprint(
        template,
        data.append_eos,
        (source.kind for source in sources),
        json.dumps(tokenizer.chat_template) if by_chat_template else "",
        _chat_settings(data),
    )

    drawn = draw_rows(sources, [len(source.rows) for source in loaded], f"{section}.sources")
    ends = Ends.of(tokenizer, data.append_eos)
    chat = ChatRenderer(tokenizer, data.loss_on, data.rewritten_turns, data.template_options, section)
    rendered = []
    for number, (source, part, chosen) in enumerate(zip(sources, loaded, drawn, strict=True)):
        key = f"{section}.sources.{number}"
        rendered.append(
            _map(
                part.rows.select(chosen),
                RowRenderer(source, part, template, ends, chat, key),
                [source.model_dump_json(), template, tokenizer_digest, template_digest],
                features=_RENDERED,
                desc=f"render {key}",
                num_proc=data.num_proc,
            )
        )
    rows = concatenate_datasets(rendered)
    if data.shuffle:
        rows = rows.shuffle(seed=data.seed)
    if data.limit is not None:
        rows = rows.select(range(min(data.limit, len(rows))))
    examples = _map(
        rows,
        encode_batch,
        [tokenizer_digest, str(data.max_length), data.labels],
        features=_ENCODED,
        desc=f"tokenise {section}",
        num_proc=data.num_proc,
        with_indices=True,
        fn_kwargs={"encoder": Encoder(tokenizer, data.max_length, data.labels)},
    )
    fingerprints = {
        "tokenizer": tokenizer_digest,
        "template": template_digest,
        "data": digest(*examples["example_id"]),
        "max_length": data.max_length,
        "labels": data.labels,
    }
    by = [
        ("the tokenizer's chat template", bool(by_chat_template)),
        (f"{template} (data.template)", template != "chat" and any(s.kind == "instruction" for s in sources)),
        ("none (text as it is)", len(by_chat_template) < sum(s.kind != "instruction" for s in sources)),
    ]
    used = " and ".join(name for name, is_used in by if is_used)
    report = _report(examples, rows, loaded, described, used)
    return PreparedData(examples.remove_columns(["num_cut", "num_unread"]), fingerprints, report)


def hold_out(dataset: Dataset, examples: int, seed: int) -> tuple[Dataset, Dataset]:
    """A data set without `examples` of its rows, drawn with `seed`, and these rows; both keep its order.

    Examples that stem from one row (turns of a conversation that are trained separately) stay together.

    Raises:
        UserError: too few rows would remain.
    """
    rows = [row_of(example_id) for example_id in dataset["example_id"]]
    numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    if not 0 < examples < len(numbers):
        raise UserError(
            f"data.hold_out is {examples}, and there are {len(numbers)} examples; accepted are 1 to {len(numbers) - 1}"
        )
    drawn = np.zeros(len(numbers), bool)
    drawn[np.random.default_rng(seed).permutation(len(numbers))[:examples]] = True
    held_out = drawn[[numbers[row] for row in rows]]
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def require_supervised(dataset: Dataset, section: str) -> None:
    """Refuse data in which nothing carries a loss, before anything is computed with it.

    Args:
        dataset: column `labels`.
        section: where it comes from, for the error.

    Raises:
        UserError: no label is left.
    """
    for batch in dataset.select_columns("labels").with_format("arrow").iter(1000):
        if any((labels.values.to_numpy()[1:] != IGNORED).any() for labels in batch["labels"]):
            return
    raise UserError(
        f"{section}: no token of its {len(dataset)} examples carries a loss, so there is nothing to "
        f"{'learn' if section == 'data' else 'measure'}. Prompts may be longer than max_length, which cuts off the "
        f"responses (raise {section.split('.')[0]}.max_length), or the responses are empty"
    )


def _settled_sources(
    sources: Sequence[SourceConfig], loaded: Sequence[LoadedSource], section: str
) -> tuple[list[SourceConfig], tuple[str, ...]]:
    """The sources with their kinds, where `auto` is what the rows are; and a line about each."""
    settled, described = [], []
    for number, (source, part) in enumerate(zip(sources, loaded, strict=True)):
        name = source.path or source.name
        if source.kind == "auto":
            recognised = recognise_rows(part, f"{section}.sources.{number}")
            source = recognised.of(source)
            described.append(f"{name}: {len(part.rows):,} rows, {recognised}")
        else:
            described.append(f"{name}: {len(part.rows):,} rows of kind {source.kind}")
        settled.append(source)
    return settled, tuple(described)


def _rendered_by_chat_template(
    sources: Sequence[SourceConfig], loaded: Sequence[LoadedSource], template: str
) -> list[int]:
    """Numbers of the sources whose rows the tokenizer's chat template renders."""

    def is_rendered(source: SourceConfig, part: LoadedSource) -> bool:
        if source.kind == "completion":
            return isinstance(parse_row(part.rows[0]["row"]).get(source.columns.prompt), list)
        return source.kind == "chat" or (source.kind == "instruction" and template == "chat")

    return [n for n, (source, part) in enumerate(zip(sources, loaded, strict=True)) if is_rendered(source, part)]


def _chat_settings(data: DataConfig) -> dict[str, Any]:
    """The settings of conversations that are not at their defaults."""
    settings = {name: getattr(data, name) for name in ("loss_on", "rewritten_turns", "template_options")}
    return {name: value for name, value in settings.items() if value != type(data).model_fields[name].default}


def _map(rows: Dataset, function: Callable, inputs: list[str], **options) -> Dataset:
    """`Dataset.map` whose cache is keyed by the data, `inputs` and the code of this package.

    The default key pickles the function with its tokenizer: it misses edits in imported modules, and a tokenizer's
    pickle changes as it is used.
    """
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return rows.map(
        function,
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint=digest(rows._fingerprint, json.dumps(inputs), *code),
        **options,
    )


def _report(
    examples: Dataset, rows: Dataset, loaded: Sequence[LoadedSource], described: tuple[str, ...], template: str
) -> DataReport:
    cut, unread = np.asarray(examples["num_cut"]), np.asarray(examples["num_unread"])
    lengths, supervised = [], []
    for batch in examples.select_columns("labels").with_format("arrow").iter(1000):
        for labels in batch["labels"]:
            labels = labels.values.to_numpy()
            lengths.append(len(labels))
            supervised.append(int((labels[1:] != IGNORED).sum()))  # the first token is never predicted
    notes = [note for part in loaded for note in part.notes]
    if (additional := len(examples) - len(rows)) > 0:
        notes.append(
            f"{additional:,} examples were added for turns that the chat template renders differently in a history "
            "(rewritten_turns: separate)."
        )
    shortened = [(place, what) for place, what in zip(rows["place"], rows["left_out"], strict=True) if what]
    if shortened:
        place, what = shortened[0]
        notes.append(
            f"WARNING: in {len(shortened):,} of {len(rows):,} conversations the chat template leaves out text of a "
            f"message, such as reasoning or a role that it does not know; first in {place}: {what}."
        )
    rows_read = sum(part.rows_read for part in loaded)
    return DataReport(
        rows_read=rows_read,
        rows_filtered=rows_read - sum(len(part.rows) for part in loaded),
        examples=len(examples),
        truncated_examples=int(((cut > 0) | (unread > 0)).sum()),
        tokens_cut=int(cut.sum()),
        unsupervised_examples=supervised.count(0),
        tokens=sum(lengths),
        supervised_tokens=sum(supervised),
        characters_cut=int(unread.sum()),
        sources=described,
        template=template,
        notes=tuple(notes),
    )
