"""Rows to rendered examples, by the kind of their source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenseek.config import NEEDED_COLUMNS, DataConfig, SourceConfig
from tokenseek.data.chat import ChatRenderer
from tokenseek.data.formats import hint
from tokenseek.data.messages import read_messages, read_tools
from tokenseek.data.reading import parse_row
from tokenseek.data.sources import LoadedSource, require_column
from tokenseek.data.templates import Ends, Rendered, render_completion, render_instruction, render_text
from tokenseek.errors import UserError

# Those that are read where the data has them and no other name is given.
_OPTIONAL = {"instruction": ("input",), "chat": ("tools", "system"), "completion": ("tools",), "text": ()}


class RowRenderer:
    """Renders batches of rows (`row`, `place`) of one source, after a look at its columns.

    Args:
        source: of a kind that is settled (not `auto`).
        template: of instructions, settled too.

    Raises:
        UserError: a column is missing.
    """

    def __init__(
        self, source: SourceConfig, loaded: LoadedSource, template: str, ends: Ends, chat: ChatRenderer, key: str
    ) -> None:
        self.kind, self.template, self.ends, self.chat, self.key = source.kind, template, ends, chat, key
        self.columns = read_columns(source, loaded, key)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        done = [self._render(row, place) for row, place in zip(batch["row"], batch["place"], strict=True)]
        return {
            "place": batch["place"],
            "left_out": [examples[0].left_out for examples in done],
            "text": [[example.text for example in examples] for examples in done],
            "spans": [[example.spans for example in examples] for examples in done],
            "add_special_tokens": [[example.add_special_tokens for example in examples] for examples in done],
        }

    def _render(self, row: str, place: str) -> list[Rendered]:
        cells = parse_row(row)
        render: Callable[[dict[str, Any]], list[Rendered]] = {
            "instruction": self._instruction,
            "completion": self._completion,
            "chat": self._chat,
            "text": self._plain_text,
        }[self.kind]
        try:
            examples = render(cells)
            for example in examples:
                example.text.encode()
        except UserError as error:
            raise UserError(f"{self.key}: {place}: {error}") from error
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.key}: {place}: the text holds half of a surrogate pair ({error.object[error.start]!r}), which "
                "is not a character; mend or drop the row"
            ) from error
        return examples

    def _instruction(self, row: dict[str, Any]) -> list[Rendered]:
        # An empty or missing input is Alpaca's way to say that there is none.
        given = "" if self._optional(row, "input") is None else self._text(row, "input")
        instruction, response = self._text(row, "instruction"), self._text(row, "response")
        if self.template == "chat":
            task = f"{instruction}\n\n{given}" if given else instruction
            return self.chat.render([{"role": "user", "content": task}, {"role": "assistant", "content": response}])
        return [render_instruction(self.template, instruction, given, response, self.ends)]

    def _completion(self, row: dict[str, Any]) -> list[Rendered]:
        prompt, completion = (row.get(self.columns[name]) for name in ("prompt", "completion"))
        if isinstance(prompt, list) and isinstance(completion, list):
            before = read_messages(prompt)
            return self.chat.render([*before, *read_messages(completion)], self._tools(row), first_turn=len(before))
        return [render_completion(self._text(row, "prompt"), self._text(row, "completion"), self.ends)]

    def _chat(self, row: dict[str, Any]) -> list[Rendered]:
        column = self.columns["messages"]
        if row.get(column) is None:
            raise UserError(f"column {column!r} holds no list of messages{self._advice(column)}")
        try:
            messages = read_messages(row[column], self._optional(row, "system"))
        except UserError as error:
            raise UserError(f"column {column!r}: {error}") from error
        return self.chat.render(messages, self._tools(row))

    def _plain_text(self, row: dict[str, Any]) -> list[Rendered]:
        return [render_text(self._text(row, "text"), self.ends)]

    def _tools(self, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        return read_tools(self._optional(row, "tools"))

    def _optional(self, row: dict[str, Any], name: str) -> Any:
        """The cell of a column that the data may lack."""
        return row.get(self.columns[name]) if name in self.columns else None

    def _text(self, row: dict[str, Any], name: str) -> str:
        column = self.columns[name]
        value = row.get(column)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        if value is None:
            raise UserError(f"column {column!r} holds nothing; accepted is text{self._advice(column)}")
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise UserError(f"column {column!r} holds {shown}, a {type(value).__name__}; accepted is text")

    def _advice(self, column: str) -> str:
        return f" (drop rows without a value with {self.key}.drop: {{{column}: [null]}})"


def read_columns(source: SourceConfig, loaded: LoadedSource, key: str) -> dict[str, str]:
    """The data's names of the columns that the kind of a source reads, by their names in `columns`.

    Raises:
        UserError: one is missing; says what the rows look like.
    """
    columns: dict[str, str] = {}
    named = {name: getattr(source.columns, name) for name in NEEDED_COLUMNS[source.kind]}
    for name, column in named.items():
        try:
            others = {other_column for other, other_column in named.items() if other != name}
            require_column(loaded.columns, column, f"{key}.columns.{name}", others)
        except UserError as error:
            raise UserError(f"{error}{hint(loaded, key)}") from error
        columns[name] = column
    for name in _OPTIONAL[source.kind]:
        column = getattr(source.columns, name)
        if column:
            require_column(loaded.columns, column, f"{key}.columns.{name}")
            columns[name] = column
        elif column is None and name in loaded.columns and name not in columns.values():
            columns[name] = name
    return columns


def settled_template(data: DataConfig, tokenizer: Any) -> str:
    """`data.template`, where `auto` is the tokenizer's chat template, if it has one, and else Alpaca's."""
    if data.template != "auto":
        return data.template
    return "chat" if tokenizer.chat_template else "alpaca"
