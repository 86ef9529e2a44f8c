"""The sections `data` and `eval_data`: sources, their columns, and how rows become examples."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from tokenseek.config.section import CellValue, NonNegativeInt, PositiveInt, Section
from tokenseek.imported import import_named


class Columns(Section):
    """The data's own name of each column that the kind of source reads.

    `input`, `tools` and `system` left out are read from columns of these names where the data has them; an empty name
    reads none.
    """

    instruction: str = "instruction"
    input: str | None = None
    response: str = "response"
    messages: str = "messages"
    tools: str | None = None
    system: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"


_COLUMNS_OF_KIND = {
    "auto": set(),
    "instruction": {"instruction", "input", "response"},
    "chat": {"messages", "tools", "system"},
    "completion": {"prompt", "completion", "tools"},
    "text": {"text"},
}

# The columns that a kind of source cannot do without, by their names in `columns`.
NEEDED_COLUMNS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "instruction": ("instruction", "response"),
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}


class SourceConfig(Section):
    """One data set: a local file or folder (`path`) or a data set of the hub (`name`).

    `drop` and `keep` filter rows by the values of a column. A source adds all its rows; or `rows` of them; or, among
    the sources that have a `weight`, the largest share that keeps the proportion of the weights without repeating a
    row. Drawn rows are chosen with `seed` and stay in the data's order.

    `streaming` reads rows while a run trains on them, pass after pass: no data set is made before, and none is kept. It
    needs `training.max_steps`, and a way to select without an index. `data.shuffle` shuffles in a buffer of 10,000.

    `kind` says what a row is: an `instruction` (with an input or without) and its response; a `chat`, as messages or in
    ShareGPT's form; a prompt and its `completion`, of text or of messages; or `text`. With `auto`, kind and columns are
    recognised from the first rows. `convert`, the import path of a function (`my_package.my_module:my_format`), makes
    such rows of others: it takes a row behind the filters, a dict of its columns, and returns the one that is read.
    """

    path: str | None = None
    name: str | None = None
    config_name: str | None = None
    split: str = "train"
    kind: Literal["auto", "instruction", "chat", "completion", "text"] = "instruction"
    convert: str | None = None
    columns: Columns = Columns()
    drop: dict[str, list[CellValue]] = {}
    keep: dict[str, list[CellValue]] = {}
    weight: Annotated[float, Field(gt=0)] | None = None
    rows: PositiveInt | None = None
    seed: NonNegativeInt = 0
    streaming: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError(
                "give either path (a local file or folder) or name (a data set of the hub) and set the other to null, "
                f"got path={self.path!r} and name={self.name!r}"
            )
        if re.match(r"[a-z][a-z0-9+-]*://", self.path or self.name or "", re.IGNORECASE):
            raise ValueError(
                f"{self.path or self.name} is an address; data are files and folders of this machine, or the name of a "
                "data set of the hub (owner/name). Fetch the file first (curl -LO ...), or give the name"
            )
        if self.weight is not None and self.rows is not None:
            raise ValueError("give either weight or rows, not both")
        if self.streaming and (self.weight is not None or self.rows is not None):
            raise ValueError(
                "streaming: true reads a source as it comes; leave weight and rows out, which need all of it"
            )
        if self.streaming and self.path is not None and "[" in self.split:
            raise ValueError(f"streaming: true reads a file from its beginning; split {self.split!r} needs all of it")
        if self.config_name is not None and self.name is None:
            raise ValueError("config_name belongs to a data set of the hub; a local path has none")
        if self.convert is not None:
            import_named(self.convert, "convert")
        read = _COLUMNS_OF_KIND[self.kind]
        if surplus := [
            name for name, column in self.columns if name not in read and column != getattr(Columns(), name)
        ]:
            reads = f"it reads {sorted(read)}" if read else "name the kind that the columns belong to"
            raise ValueError(f"columns {surplus} are not read by kind {self.kind}; {reads}")
        return self


class DataConfig(Section):
    """Sources, and how a row becomes tokens and labels.

    `labels: response` puts the loss on responses (assistant turns) only, `sequence` on every token. `limit` keeps the
    first rows after mixing and shuffling. `hold_out` rows of training data, drawn with `seed`, are kept out of
    training and are its `eval_data`; they are scored like the others, so that an index serves with and without them.

    `template` renders instructions: as `alpaca`, `plain`, by the tokenizer's `chat` template, or with `auto` by that if
    there is one and else as `alpaca`. Conversations always take the chat template, with `template_options` as its
    further variables (`{enable_thinking: false}`). In them `loss_on: last` puts the loss on the last turn of the
    assistant only; the fields `train` and `weight` of a message win. Some templates render a turn differently once
    others follow: `rewritten_turns: refuse` such conversations, or train these turns in examples of their own
    (`separate`).
    """

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    template: Literal["auto", "alpaca", "plain", "chat"] = "alpaca"
    template_options: dict[str, Any] = {}
    loss_on: Literal["all", "last"] = "all"
    rewritten_turns: Literal["refuse", "separate"] = "refuse"
    max_length: Annotated[int, Field(ge=2)] = 2048
    labels: Literal["response", "sequence"] = "response"
    append_eos: bool = True
    limit: PositiveInt | None = None
    shuffle: bool = False
    hold_out: PositiveInt | None = None
    seed: NonNegativeInt = 0
    num_proc: PositiveInt | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether some source is read while the run trains on it."""
        return any(source.streaming for source in self.sources)

    @model_validator(mode="after")
    def _check_mixing(self) -> Self:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(w or s.rows is not None for w, s in zip(weighted, self.sources, strict=True)):
            raise ValueError("one source has a weight, so every source needs a weight or rows")
        streamed = [source.streaming for source in self.sources]
        if any(streamed) and not all(streamed):
            raise ValueError("one source is streamed, so every source needs streaming: true")
        if any(streamed) and self.hold_out is not None:
            raise ValueError("hold_out draws from all rows, and these are streamed; give an eval_data section instead")
        if self.labels == "sequence" and self.loss_on == "last":
            raise ValueError(
                "labels: sequence puts the loss on every token, and loss_on: last on one turn; leave one out"
            )
        return self
