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
from tokenseek.data.formats import Format, recognise_rows
from tokenseek.data.reading import parse_row
from tokenseek.data.rows import RowRenderer, read_columns, settled_template
from tokenseek.data.sources import LoadedSource, cache_error, draw_rows, load_source
from tokenseek.data.streaming import StreamedExamples, load_head, stream_rows
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
        loss = f"template: {self.template}; loss on {self.supervised_share:.0%} of the tokens"
        return "\n".join([*self.sources, loss, report, *self.notes])


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
    keys = [f"{section}.sources.{number}" for number in range(len(data.sources))]
    loaded = [_load(source, key) for source, key in zip(data.sources, keys, strict=True)]
    formats = [_format(source, part, key) for source, part, key in zip(data.sources, loaded, keys, strict=True)]
    sources = [
        f.of(source) if source.kind == "auto" else source for f, source in zip(formats, data.sources, strict=True)
    ]
    template = settled_template(data, tokenizer)
    by_chat_template = _rendered_by_chat_template(sources, loaded, template)
    if any(by_chat_template) and not tokenizer.chat_template:
        number = by_chat_template.index(True)
        raise UserError(
            f"{keys[number]}: rows of kind {sources[number].kind} need a tokenizer with a chat template here; use that "
            "of an instruction-tuned model"
            + (f", or {section}.template=alpaca" if sources[number].kind == "instruction" else "")
        )
    tokenizer_digest = tokenizer_fingerprint(tokenizer)
    template_digest = template_fingerprint(
        template,
        data.append_eos,
        (source.kind for source in sources),
        json.dumps(tokenizer.chat_template) if any(by_chat_template) else "",
        _chat_settings(data),
    )

    drawn = draw_rows(sources, [len(part.rows) for part in loaded], f"{section}.sources")
    ends = Ends.of(tokenizer, data.append_eos)
    chat = ChatRenderer(
        tokenizer, data.loss_on, data.rewritten_turns, data.template_options, section, data.labels == "sequence"
    )
    rendered = [
        _map(
            part.rows.select(chosen),
            RowRenderer(source, part, template, ends, chat, key),
            [source.model_dump_json(), template, tokenizer_digest, template_digest, data.labels],
            features=_RENDERED,
            desc=f"render {key}",
            num_proc=data.num_proc,
        )
        for source, part, chosen, key in zip(sources, loaded, drawn, keys, strict=True)
    ]
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
    fingerprints: dict[str, str | int] = {
        "tokenizer": tokenizer_digest,
        "template": template_digest,
        "data": digest(*examples["example_id"]),
        "max_length": data.max_length,
        "labels": data.labels,
    }
    described = tuple(
        f"{source.path or source.name}: {len(part.rows):,} rows, {recognised}"
        for source, part, recognised in zip(sources, loaded, formats, strict=True)
    )
    report = _report(examples, rows, loaded, described, _templates_used(sources, by_chat_template, template))
    return PreparedData(examples.remove_columns(["num_cut", "num_unread"]), fingerprints, report)


def stream_examples(
    data: DataConfig, tokenizer: Any, *, part: int = 0, parts: int = 1, skip: int = 0, section: str = "data"
) -> StreamedExamples:
    """The examples of streamed sources, rendered and tokenised one by one as they are asked for.

    They are those of :func:`prepare_dataset` for the same sources, in their order, with the same ids.

    Args:
        part, parts, skip: as in :class:`~tokenseek.data.streaming.StreamedExamples`.

    Raises:
        UserError: as :func:`prepare_dataset`, when the row at fault is met; or a row becomes several examples.
    """
    keys = [f"{section}.sources.{number}" for number in range(len(data.sources))]
    heads = [_load(source, key) for source, key in zip(data.sources, keys, strict=True)]
    formats = [_format(source, head, key) for source, head, key in zip(data.sources, heads, keys, strict=True)]
    sources = [
        f.of(source) if source.kind == "auto" else source for f, source in zip(formats, data.sources, strict=True)
    ]
    template, ends = settled_template(data, tokenizer), Ends.of(tokenizer, data.append_eos)
    chat = ChatRenderer(
        tokenizer, data.loss_on, data.rewritten_turns, data.template_options, section, data.labels == "sequence"
    )
    renderers = [
        RowRenderer(source, head, template, ends, chat, key)
        for source, head, key in zip(sources, heads, keys, strict=True)
    ]
    encoder = Encoder(tokenizer, data.max_length, data.labels)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        rendered = renderers[row["source"]]({"row": [row["row"]], "place": [row["place"]]})
        columns = encode_batch(rendered, [row["position"]], encoder=encoder)
        if len(columns["example_id"]) != 1:
            raise UserError(
                f"{row['place']}: the chat template renders turns of this conversation differently once others follow. "
                f"With {section}.rewritten_turns: separate it becomes {len(columns['example_id'])} examples, which a "
                f"stream cannot count; set {section}.loss_on=last, or streaming=false"
            )
        return {name: columns[name][0] for name in ("example_id", "input_ids", "labels")}

    return StreamedExamples(stream_rows(data, section), encode, part, parts, skip)


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


def _load(source: SourceConfig, key: str) -> LoadedSource:
    return load_head(source, key) if source.streaming else load_source(source, key)


def _format(source: SourceConfig, loaded: LoadedSource, key: str) -> Format:
    """What the rows of a source are: as the configuration says, or recognised where it says `auto`."""
    if source.kind == "auto":
        return recognise_rows(loaded, key)
    columns = read_columns(source, loaded, key)
    unread = tuple(column for column in loaded.columns if column not in columns.values())
    return Format(source.kind, source.kind, columns, unread)


def _rendered_by_chat_template(
    sources: Sequence[SourceConfig], loaded: Sequence[LoadedSource], template: str
) -> list[bool]:
    """Of each source, whether the tokenizer's chat template renders its rows."""

    def is_rendered(source: SourceConfig, part: LoadedSource) -> bool:
        if source.kind == "completion":
            return isinstance(parse_row(part.rows[0]["row"]).get(source.columns.prompt), list)
        return source.kind == "chat" or (source.kind == "instruction" and template == "chat")

    return [is_rendered(source, part) for source, part in zip(sources, loaded, strict=True)]


def _templates_used(sources: Sequence[SourceConfig], by_chat_template: Sequence[bool], template: str) -> str:
    def name(source: SourceConfig, is_chat: bool) -> str:
        if is_chat:
            return "the tokenizer's chat template"
        return f"{template} (data.template)" if source.kind == "instruction" else "none (text as it is)"

    used = (name(source, is_chat) for source, is_chat in zip(sources, by_chat_template, strict=True))
    return " and ".join(dict.fromkeys(used))


def _chat_settings(data: DataConfig) -> dict[str, Any]:
    """The settings of conversations that are not at their defaults."""
    settings = {name: getattr(data, name) for name in ("loss_on", "rewritten_turns", "template_options")}
    return {name: value for name, value in settings.items() if value != type(data).model_fields[name].default}


def _map(rows: Dataset, function: Callable[..., Any], inputs: list[str], **options: Any) -> Dataset:
    """`Dataset.map` whose cache is keyed by the data, `inputs` and the code of this package.

    The default key pickles the function with its tokenizer: it misses edits in imported modules, and a tokenizer's
    pickle changes as it is used.
    """
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    try:
        return rows.map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            new_fingerprint=digest(rows._fingerprint, json.dumps(inputs), *code),
            **options,
        )
    except OSError as error:
        raise cache_error(error) from error


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
