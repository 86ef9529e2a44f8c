"""An index and its selected tokens, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokenseek.index import TokenIndex
from tokenseek.labels import IGNORED

_MARK, _DIM, _END = "\033[1;30;43m", "\033[2m", "\033[0m"
# Two shades each: tokens with a loss black on green, and the others grey.
_LEARNED, _GIVEN = ("\033[30;42m", "\033[30;102m"), ("\033[90m", "\033[37m")


def describe_index(index: TokenIndex) -> str:
    """The header of an index, as text."""
    header = index.header
    rows = {"examples": f"{header.num_examples:,}", "tokens": f"{header.num_tokens:,}"}
    rows |= {name: str(value) for name, value in header.fingerprints.items()}
    rows |= {f"scoring.{name}": str(value) for name, value in header.scoring.items()}
    width = max(map(len, rows))
    return "\n".join([str(index.path), *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def render_example(
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    labels: Sequence[int],
    selected: np.ndarray,
    color: bool = True,
) -> str:
    """The text of an example with its selected tokens marked; tokens without a loss are dimmed.

    Without colour, selected tokens stand in ``[[ ]]``. Control characters of the data never reach the terminal.
    """
    chosen = set(selected.tolist())
    pieces = []
    for position, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        text = _printable(str(tokenizer.decode([token])))
        if position in chosen:
            text = f"{_MARK}{text}{_END}" if color else f"[[{text}]]"
        elif label == -100 and color:
            text = f"{_DIM}{text}{_END}"
        pieces.append(text)
    return "".join(pieces)


def render_labels(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int], color: bool = True
) -> str:
    """The tokens of an example, those with a loss in colour; neighbours differ in shade, so that all can be told apart.

    Without colour a bar stands between tokens, and runs of tokens with a loss are in ``[[ ]]``. Ends of lines are shown
    as such and as what they are.
    """
    pieces, before = [], False
    for position, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        text = _printable(str(tokenizer.decode([token]))).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
        learned = label != IGNORED
        if color:
            pieces.append(f"{(_LEARNED if learned else _GIVEN)[position % 2]}{text}{_END}")
            continue
        if learned != before:
            pieces.append("[[" if learned else "]]")
        elif position:
            pieces.append("|")
        pieces.append(text)
        before = learned
    return "".join([*pieces, "]]" if before else ""])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
