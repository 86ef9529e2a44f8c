"""Formats: which of the ways to write training data down a source follows, from its first rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenseek.config import Columns, SourceConfig
from tokenseek.data.messages import read_messages
from tokenseek.data.reading import parse_row
from tokenseek.data.sources import LoadedSource, load_source
from tokenseek.errors import UserError

_ROWS_LOOKED_AT = 100

# Columns that hold a conversation, the likeliest first.
_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
# Pairs of a task and its answer, and the column that adds to the task.
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "output"),
)
_INPUTS = ("input", "context")
_TEXTS = ("text", "content", "document")
_TEXT_OF_FORMATS = (
    "conversations (a column messages or conversations), prompt and completion, instruction (or question, prompt) and "
    "output (or response, answer), and text"
)


@dataclass(frozen=True)
class Format:
    """What the rows of a source are.

    Attributes:
        name: as reports show it.
        kind, columns: of :class:`tokenseek.config.SourceConfig`.
        unread: columns that do not become text.
    """

    name: str
    kind: str
    columns: dict[str, str]
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        read = ", ".join(
            f"{role} from {column!r}" if role != column else column for role, column in self.columns.items()
        )
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{self.name} ({read}{unread})"

    def of(self, source: SourceConfig) -> SourceConfig:
        """The source with this kind and these columns."""
        return source.model_copy(update={"kind": self.kind, "columns": Columns(**self.columns)})


def recognise(source: SourceConfig, key: str = "data.sources.0") -> Format:
    """The format of a source's rows.

    Args:
        key: the source's dotted path in the configuration, for errors.

    Raises:
        UserError: the source cannot be read, holds preference pairs, or nothing that is known; lists its columns.

    Example:
        >>> recognise(SourceConfig(path="train.jsonl"))
        Format(name='instruction and response', kind='instruction', columns={...})
    """
    return recognise_rows(load_source(source, key), key)


def recognise_rows(loaded: LoadedSource, key: str) -> Format:
    """:func:`recognise` for a source that is loaded."""
    rows = [parse_row(row) for row in loaded.rows[:_ROWS_LOOKED_AT]["row"]]
    by_lower = {column.lower(): column for column in reversed(loaded.columns)}

    def first(column: str) -> Any:
        """The first cell of a column that is not missing."""
        return next((row[column] for row in rows if row.get(column) is not None), None)

    def known(names: Sequence[str], of: Callable[[Any], bool]) -> str | None:
        return next((by_lower[name] for name in names if name in by_lower and of(first(by_lower[name]))), None)

    def found(name: str, kind: str, columns: dict[str, str | None]) -> Format:
        read = {role: column for role, column in columns.items() if column is not None}
        return Format(name, kind, read, tuple(column for column in loaded.columns if column not in read.values()))

    where = f"{key}: {loaded.rows[0]['place']}"
    _refuse_preferences(by_lower, first, key)
    if messages := known(_CONVERSATIONS, _is_conversation):
        name = "ShareGPT conversations" if _is_sharegpt(first(messages)) else "chat messages"
        columns = {"messages": messages, "tools": by_lower.get("tools"), "system": known(["system"], _is_text)}
        return found(name, "chat", columns)
    prompt, completion = (known([name], lambda cell: cell is not None) for name in ("prompt", "completion"))
    if prompt and completion:
        columns = {"prompt": prompt, "completion": completion, "tools": by_lower.get("tools")}
        return found("prompt and completion", "completion", columns)
    for instruction, response in _PAIRS:
        pair = known([instruction], _is_text), known([response], _is_text)
        if all(pair):
            given = known([name for name in _INPUTS if name != instruction], _is_text)
            name = "Alpaca" if pair == ("instruction", "output") else "instruction and response"
            return found(name, "instruction", {"instruction": pair[0], "input": given, "response": pair[1]})
    if text := known(_TEXTS, _is_text) or (len(loaded.columns) == 1 and known(list(by_lower), _is_text)):
        return found("plain text", "text", {"text": text})
    raise UserError(
        f"{where}: none of the formats that are known: {_TEXT_OF_FORMATS}. The columns are "
        f"{', '.join(loaded.columns)}; say what they are with {key}.kind and {key}.columns, such as --set "
        f"{key}.kind=instruction --set '{key}.columns={{instruction: {loaded.columns[0]}, response: "
        f"{loaded.columns[-1]}}}'"
    )


def hint(loaded: LoadedSource, key: str) -> str:
    """For an error about a missing column: what the rows look like; nothing if they look like nothing known."""
    try:
        return f". The rows look like {recognise_rows(loaded, key)}: set {key}.kind=auto to read them so"
    except UserError as error:
        return f". {error}" if "preference" in str(error) else ""


def _refuse_preferences(by_lower: dict[str, str], first: Callable[[str], Any], key: str) -> None:
    if {"chosen", "rejected"} <= by_lower.keys():
        chosen = by_lower["chosen"]
        is_chat = _is_conversation(first(chosen))
        columns = (
            f"{{messages: {chosen}}}"
            if is_chat
            else f"{{prompt: {by_lower.get('prompt', 'prompt')}, completion: {chosen}}}"
        )
        raise UserError(
            f"{key}: the rows are preference pairs (columns chosen and rejected), for DPO and the like, which "
            f"TokenSeek does not train. To train on the chosen answers, set "
            f"{key}.kind={'chat' if is_chat else 'completion'} and {key}.columns={columns}"
        )
    if {"prompt", "completion", "label"} <= by_lower.keys() and isinstance(first(by_lower["label"]), bool):
        raise UserError(
            f"{key}: the rows are judged answers (a label true or false, unpaired preference data for KTO), which "
            f"TokenSeek does not train. To train on the good ones, set {key}.kind=completion and "
            f"{key}.keep={{{by_lower['label']}: [true]}}"
        )


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str | int | float) and not isinstance(cell, bool)


def _is_conversation(cell: Any) -> bool:
    if not isinstance(cell, list) and not (isinstance(cell, str) and cell.lstrip().startswith("[")):
        return False
    try:
        return bool(read_messages(cell))
    except UserError as error:
        return "accepted" not in str(error)  # messages with a fault of their own, of which preparing tells


def _is_sharegpt(cell: Any) -> bool:
    return '"from"' in cell if isinstance(cell, str) else "from" in cell[0]
