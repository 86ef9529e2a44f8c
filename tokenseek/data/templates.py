"""Rendering: one row of a data set becomes one text, with the spans of characters that carry a loss.

Rendering to text first keeps the tokenizer out of it: prompt and response are tokenised together, exactly as the model
will meet them when it generates (see `tokenseek.data.encoding`). Conversations are rendered by `tokenseek.data.chat`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Section S1.1 (Taori et al., 2023), in the layout of Stanford's code; `without_input` is for rows with an empty input.
TEMPLATES: dict[str, dict[str, str]] = {
    "alpaca": {
        "with_input": (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
        "without_input": (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:\n"
        ),
    },
    "plain": {"with_input": "{instruction}\n\n{input}\n\n", "without_input": "{instruction}\n\n"},
}


@dataclass(frozen=True)
class Rendered:
    """`spans` are (start, end) of the supervised characters of `text`, ascending.

    `add_special_tokens` is whether the tokenizer adds its own (BOS): a chat template has written them already.
    `left_out` names a message whose text the chat template does not render as a whole.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_special_tokens: bool
    left_out: str = ""


@dataclass(frozen=True)
class Ends:
    """How a text begins and ends with a tokenizer.

    Attributes:
        bos: what the tokenizer puts in front of every text; empty if nothing.
        eos: text of its end-of-sequence token; empty if it has none.
        appended: texts are to end with `eos`.
        adds_eos: the tokenizer puts `eos` behind every text.
    """

    bos: str = ""
    eos: str = ""
    appended: bool = True
    adds_eos: bool = False

    @classmethod
    def of(cls, tokenizer: Any, appended: bool) -> Ends:
        """Those of a tokenizer, by what it puts around a text.

        Args:
            appended: the end of a text is put behind it as a token, whether or not the tokenizer does so.
        """
        ids = tokenizer("a")["input_ids"]
        adds_bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        adds_eos = bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
        return cls(tokenizer.bos_token if adds_bos else "", tokenizer.eos_token or "", appended, adds_eos)

    def once(self, text: str, start: int = 0) -> Rendered:
        """The text with one BOS and one EOS, whatever of them it brings itself.

        Args:
            start: the first character that carries a loss; all behind it do.
        """
        if self.bos and text.startswith(self.bos):
            text = text[len(self.bos) :]
            start = max(0, start - len(self.bos))
        if self.eos:
            if text.rstrip().endswith(self.eos):
                text = text.rstrip()  # nothing follows the end
                if self.adds_eos:
                    text = text.removesuffix(self.eos)
            elif self.appended and not self.adds_eos:
                text += self.eos
        return Rendered(text, ((min(start, len(text)), len(text)),), add_special_tokens=True)


def render_instruction(template: str, instruction: str, input: str, response: str, ends: Ends) -> Rendered:
    """Prompt by `template`, then the response with its end, which carry the loss.

    Example:
        >>> rendered = render_instruction("plain", "Add 1 and 2.", "", "3", Ends(eos="</s>"))
        >>> rendered.text, rendered.spans
        ('Add 1 and 2.\\n\\n3</s>', ((14, 19),))
    """
    form = TEMPLATES[template]["with_input" if input else "without_input"]
    return render_completion(form.format(instruction=instruction, input=input), response, ends)


def render_completion(prompt: str, completion: str, ends: Ends) -> Rendered:
    """One behind the other; the completion with its end carries the loss."""
    return ends.once(prompt + completion, len(prompt))


def render_text(text: str, ends: Ends) -> Rendered:
    """All of the text carries the loss."""
    return ends.once(text)
