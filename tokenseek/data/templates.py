"""Rendering: one row of a data set becomes one text, with the spans of characters that carry a loss.

Rendering to text first keeps the tokenizer out of it: prompt and response are tokenised together, exactly as the model
will meet them when it generates (see `tokenseek.data.encoding`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenseek.errors import UserError

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

# Some chat templates print today's date (Llama 3.2's). With a fixed one the examples, and so an index, stay the same
# tomorrow. A macro, because it wins over the function of this name that Transformers hands to every template.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class Rendered:
    """`spans` are (start, end) of the supervised characters of `text`, ascending.

    `add_special_tokens` is whether the tokenizer adds its own (BOS): a chat template has written them already.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_special_tokens: bool


def render_instruction(template: str, instruction: str, input: str, response: str, eos: str) -> Rendered:
    """Prompt by `template`, then response and `eos` (may be empty), which carry the loss.

    Example:
        >>> rendered = render_instruction("plain", "Add 1 and 2.", "", "3", "</s>")
        >>> rendered.text, rendered.spans
        ('Add 1 and 2.\\n\\n3</s>', ((14, 19),))
    """
    form = TEMPLATES[template]["with_input" if input else "without_input"]
    prompt = form.format(instruction=instruction, input=input)
    text = prompt + response + eos
    return Rendered(text, ((len(prompt), len(text)),), add_special_tokens=True)


def render_text(text: str, eos: str) -> Rendered:
    """All of the text carries the loss."""
    text += eos
    return Rendered(text, ((0, len(text)),), add_special_tokens=True)


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Rendered:
    """A conversation by the tokenizer's chat template; each assistant turn carries the loss, its end marker included.

    A turn's span is what its message adds: from the conversation before it with the generation prompt, to the
    conversation up to it. Both must be prefixes of the whole text.

    Raises:
        UserError: messages without role and content, no assistant turn, a template that refuses the conversation or
            renders earlier turns differently once later ones are there.
    """
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for position, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            raise UserError(
                f"message {position} has the keys {sorted(message)}; accepted are messages with role and content"
            )
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        roles = [message["role"] for message in messages]
        raise UserError(f"no message of role assistant (roles are {roles}), so there is nothing to learn")

    text = _apply(tokenizer, messages, add_generation_prompt=False)
    spans = []
    for turn in turns:
        prompt = _apply(tokenizer, messages[:turn], add_generation_prompt=True)
        upto = _apply(tokenizer, messages[: turn + 1], add_generation_prompt=False)
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise UserError(
                f"the chat template renders message {turn} differently when later messages follow it, so the tokens of "
                "the assistant cannot be told apart; end each conversation at its first assistant turn or give the "
                "tokenizer a prefix-stable chat template"
            )
        spans.append((len(prompt), len(upto)))
    return Rendered(text, tuple(spans), add_special_tokens=False)


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=_FIXED_DATE + tokenizer.get_chat_template(),
        )
    except (TemplateError, TypeError) as error:
        roles = [message["role"] for message in messages]
        raise UserError(f"the chat template refuses the roles {roles}: {error}") from error
