"""Preparation: from a configuration to token ids, labels and stable example ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from tokenseek.data.report import DataReport, make_report
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
    sources = _Sources.open(data, tokenizer, section)
    by_chat_template = _rendered_by_chat_template(sources.settled, sources.loaded, sources.template)
    if any(by_chat_template) and not tokenizer.chat_template:
        raise _no_chat_template(sources, by_chat_template.index(True), section)
    tokenizer_digest = tokenizer_fingerprint(tokenizer)
    template_digest = template_fingerprint(
        sources.template,
        data.append_eos,
        (source.kind for source in sources.settled),
        json.dumps(tokenizer.chat_template) if any(by_chat_template) else "",
        _chat_settings(data),
    )
    rows = _rendered(data, sources, [sources.template, tokenizer_digest, template_digest, data.labels], section)
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
    templates = _templates_used(sources.settled, by_chat_template, sources.template)
    report = make_report(examples, rows, sources.loaded, sources.described, templates)
    return PreparedData(examples.remove_columns(["num_cut", "num_unread"]), fingerprints, report)


class _Sources(NamedTuple):
    """The sources of a configuration, read, and how their rows are rendered; each list has one item a source.

    Attributes:
        keys: dotted paths of their settings, for errors.
        settled: their settings, with a kind in the place of `auto`.
    """

    keys: list[str]
    loaded: list[LoadedSource]
    formats: list[Format]
    settled: list[SourceConfig]
    renderers: list[RowRenderer]
    template: str

    @classmethod
    def open(cls, data: DataConfig, tokenizer: Any, section: str) -> _Sources:
        keys = [f"{section}.sources.{number}" for number in range(len(data.sources))]
        loaded = [_load(source, key) for source, key in zip(data.sources, keys, strict=True)]
        formats = [_format(source, part, key) for source, part, key in zip(data.sources, loaded, keys, strict=True)]
        settled = [
            f.of(source) if source.kind == "auto" else source for f, source in zip(formats, data.sources, strict=True)
        ]
        template, ends = settled_template(data, tokenizer), Ends.of(tokenizer, data.append_eos)
        chat = ChatRenderer(
            tokenizer, data.loss_on, data.rewritten_turns, data.template_options, section, data.labels == "sequence"
        )
        renderers = [
            RowRenderer(source, part, template, ends, chat, key)
            for source, part, key in zip(settled, loaded, keys, strict=True)
        ]
        return cls(keys, loaded, formats, settled, renderers, template)

    @property
    def described(self) -> tuple[str, ...]:
        """A line of the report on each."""
        return tuple(
            f"{source.path or source.name}: {len(part.rows):,} rows, {recognised}"
            for source, part, recognised in zip(self.settled, self.loaded, self.formats, strict=True)
        )


def _no_chat_template(sources: _Sources, number: int, section: str) -> UserError:
    kind = sources.settled[number].kind
    return UserError(
        f"{sources.keys[number]}: rows of kind {kind} need a tokenizer with a chat template here; use that of an "
        "instruction-tuned model" + (f", or {section}.template=alpaca" if kind == "instruction" else "")
    )


def _rendered(data: DataConfig, sources: _Sources, inputs: list[str], section: str) -> Dataset:
    """The drawn rows of all sources as texts, shuffled and limited.

    Args:
        inputs: what the texts depend on besides the rows and their source.
    """
    drawn = draw_rows(sources.settled, [len(part.rows) for part in sources.loaded], f"{section}.sources")
    rows = concatenate_datasets(
        [
            _map(
                part.rows.select(chosen),
                renderer,
                [source.model_dump_json(), *inputs],
                features=_RENDERED,
                desc=f"render {key}",
                num_proc=data.num_proc,
            )
            for source, part, renderer, chosen, key in zip(
                sources.settled, sources.loaded, sources.renderers, drawn, sources.keys, strict=True
            )
        ]
    )
    if data.shuffle:
        rows = rows.shuffle(seed=data.seed)
    return rows if data.limit is None else rows.select(range(min(data.limit, len(rows))))


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
    renderers = _Sources.open(data, tokenizer, section).renderers
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
