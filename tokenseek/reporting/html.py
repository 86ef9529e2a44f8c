"""Examples of an index as one self-contained page, in which the selection can be changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokenseek.selection import SelectionRule, supervised_positions


@dataclass(frozen=True)
class ShownExample:
    """An example with its scores.

    Attributes:
        tokens: the text of each of the T tokens; untrusted.
        context, gradient: [T].
        supervised: bool [T]; whether a position predicts a token that carries a loss.
    """

    row: int
    example_id: str
    tokens: Sequence[str]
    context: np.ndarray
    gradient: np.ndarray
    supervised: np.ndarray


def shown_example(
    tokenizer: PreTrainedTokenizerBase, row: int, example: Mapping[str, Any], scores: tuple[np.ndarray, np.ndarray]
) -> ShownExample:
    """An example of :func:`tokenseek.prepare_dataset` with the scores that an index has for it."""
    tokens = [str(tokenizer.decode([token])) for token in example["input_ids"]]
    context, gradient = scores
    supervised = supervised_positions(example["labels"])
    return ShownExample(row, example["example_id"], tokens, context, gradient, supervised)


def render_page(examples: Sequence[ShownExample], rule: SelectionRule, subtitle: str = "") -> str:
    """The page, in HTML without any reference to another file or host.

    Its sliders begin at the ratio, alpha, beta and scope of `rule`, and select by score: what rule "top" selects.
    Nothing of the examples is taken for markup, and the page's own policy forbids it to load or send anything.

    Example:
        >>> Path("tokens.html").write_text(render_page(examples, SelectionRule(ratio=0.1)), encoding="utf-8")
    """
    data = {
        "subtitle": subtitle,
        "logOffset": rule.log_offset,
        "settings": {"ratio": rule.ratio, "alpha": rule.alpha, "beta": rule.beta, "scope": rule.scope},
        "examples": [
            {
                "row": example.row,
                "id": example.example_id,
                "tokens": list(example.tokens),
                # A float32 as the float64 of the same value, which JSON and JavaScript keep to the last bit.
                "context": [float(value) for value in example.context],
                "gradient": [float(value) for value in example.gradient],
                "supervised": [bool(value) for value in example.supervised],
            }
            for example in examples
        ],
    }
    folder = files("tokenseek.reporting") / "page"
    page = (folder / "page.html").read_text(encoding="utf-8")
    for name in ("select", "view"):
        page = page.replace(f"@{name.upper()}@", (folder / f"{name}.js").read_text(encoding="utf-8"))
    return page.replace("@DATA@", _script_json(data))  # last: what it brings is not searched again


def _script_json(value: Any) -> str:
    """JSON that stands inside a script element: without `<`, nothing in it ends the element or opens a comment."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
