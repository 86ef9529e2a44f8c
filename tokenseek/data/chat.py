"""Conversations, rendered by a tokenizer's chat template, with the spans that learn.

What a turn of the assistant is in a rendered conversation is found by rendering: its text is what follows the
generation prompt when the conversation ends with it. Some templates render a turn differently once others follow (they
drop its reasoning, or end it with another token). Such a turn is trained as it was generated, or not at all: never as
the history that a later turn sees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenseek.data.messages import TRAINED, Message, own_wish
from tokenseek.data.templates import Rendered
from tokenseek.errors import UserError

Span = tuple[int, int]

# Some chat templates print today's date (Llama 3.2's). With a fixed one the examples, and so an index, stay the same
# tomorrow. A macro, because it wins over the function of this name that Transformers hands to every template.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# A chat template may stand on such an error as well as on one of its own.
_TEMPLATE_ERRORS = (TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations by a tokenizer's chat template.

    Attributes:
        tokenizer: has a chat template.
        loss_on: `all` turns of the assistant, or the `last` one. A message's own `train` (true or false) or `weight`
            (1 or 0) wins.
        rewritten_turns: what becomes of turns that the template renders differently once others follow: `refuse` the
            conversation, or train each in a `separate` example that ends with it.
        options: further variables of the template (`enable_thinking`).
        key: the section of the configuration that has these settings, for errors.
        every_token: the loss is on every token, so that no turn has to be found.
    """

    tokenizer: Any
    loss_on: str = "all"
    rewritten_turns: str = "refuse"
    options: Mapping[str, Any] | None = None
    key: str = "data"
    every_token: bool = False

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """The tokens that were added to the vocabulary, of which none is ever cut."""
        return _one_of(token.content for token in self.tokenizer.added_tokens_decoder.values())

    @cached_property
    def closing(self) -> re.Pattern[str]:
        """Nothing but special tokens and space."""
        special = _one_of(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return re.compile(rf"(?:\s|{special.pattern})*")

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, first_turn: int = 0
    ) -> list[Rendered]:
        """The examples of a conversation: one, or several where turns are trained separately.

        Args:
            first_turn: messages before it are the prompt and carry no loss.

        Raises:
            UserError: no turn of the assistant, a template that refuses the conversation, or one that renders turns
                differently once others follow.
        """
        turns = [] if self.every_token else self._trained_turns(messages, first_turn)
        messages, whole = _without_own_ends(self, *_taken(self, messages, tools), tools)
        if self.every_token:
            left_out = _left_out(messages, dict.fromkeys(range(len(messages)), whole))
            return [Rendered(whole, ((0, len(whole)),), add_special_tokens=False, left_out=left_out)]
        conversation = _Conversation(self, messages, tools, whole)
        shown = {turn: whole for turn, message in enumerate(messages) if message["role"] != "assistant"}
        if conversation.has_markers and len(turns) == len(_assistant_turns(messages)):
            text, spans = conversation.marked()
            left_out = _left_out(messages, shown | dict.fromkeys(turns, text))
            return [Rendered(text, spans, add_special_tokens=False, left_out=left_out)]
        generated = {turn: conversation.turn(turn) for turn in turns}
        left_out = _left_out(messages, shown | {turn: text for turn, (text, _) in generated.items()})
        return [
            Rendered(text, spans, add_special_tokens=False, left_out=left_out)
            for text, spans in self._examples(conversation, whole, generated)
        ]

    def _trained_turns(self, messages: Sequence[Message], first_turn: int) -> list[int]:
        turns = [turn for turn in _assistant_turns(messages) if turn >= first_turn]
        if not turns:
            roles = [message["role"] for message in messages]
            raise UserError(f"no message of role assistant (roles are {roles}), so there is nothing to learn")
        chosen = turns[-1:] if self.loss_on == "last" else turns
        wished = {turn: wish for turn, message in enumerate(messages) if (wish := own_wish(message, turn)) is not None}
        if unheard := [turn for turn, wish in wished.items() if wish and turn not in turns]:
            raise UserError(
                f"message {unheard[0]} ({messages[unheard[0]]['role']}) asks for a loss; only turns of the assistant "
                "carry one"
            )
        if self.loss_on == "last":
            return [turn for turn in chosen if wished.get(turn, True)]
        return [turn for turn in turns if wished.get(turn, True)]

    def _examples(
        self, conversation: _Conversation, whole: str, generated: Mapping[int, tuple[str, int]]
    ) -> list[tuple[str, tuple[Span, ...]]]:
        """Texts and spans. Latest turns first: an example holds all turns that are in it as they were generated."""
        examples, text, left = [], whole, list(generated)
        while left:
            spans = {turn: span for turn in left if (span := conversation.find(*generated[turn], text))}
            rewritten = [turn for turn in left if turn not in spans]
            if rewritten and self.rewritten_turns == "refuse":
                raise UserError(self._refusal(rewritten[0], generated[rewritten[0]]))
            if spans:
                examples.append((text, tuple(sorted(spans.values()))))
            left = rewritten
            if left:
                text = generated[left[-1]][0]  # holds that turn to its end, so that one turn less is left each time
        return examples[::-1] or [(whole, ())]

    def _refusal(self, turn: int, generated: tuple[str, int]) -> str:
        return (
            f"the chat template renders message {turn} differently when later messages follow it (it drops reasoning, "
            f"say), so that what the assistant generated there, {generated[0][generated[1] :]!r:.60}, is not in the "
            f"conversation. Train such turns in examples of their own ({self.key}.rewritten_turns=separate), or "
            f"put the loss on the last turn only ({self.key}.loss_on=last)"
        )


class _Conversation:
    """The renderings of one conversation."""

    def __init__(
        self, renderer: ChatRenderer, messages: list[Message], tools: list[dict[str, Any]] | None, whole: str
    ) -> None:
        self.renderer, self.messages, self.tools, self.whole = renderer, messages, tools, whole
        self.template = renderer.tokenizer.get_chat_template(tools=tools)
        self.markers, self.closing = renderer.markers, renderer.closing

    @property
    def has_markers(self) -> bool:
        return bool(_GENERATION.search(self.template))

    def apply(self, upto: int, generation_prompt: bool = False) -> str:
        """The text of the first `upto` messages."""
        if upto == len(self.messages) and not generation_prompt:
            return self.whole
        return _apply(self.renderer, self.messages[:upto], self.tools, generation_prompt)

    def marked(self) -> tuple[str, tuple[Span, ...]]:
        """The text, and what the template itself marks as generated."""
        text, spans = _rendered(self.renderer, self.messages, self.tools, return_assistant_tokens_mask=True)
        if not spans:
            raise UserError("the chat template has {% generation %} marks, but marks nothing in this conversation")
        return text, tuple(sorted(spans))

    def turn(self, turn: int) -> tuple[str, int]:
        """The conversation that ends with a turn, and where what the assistant generated begins in it."""
        prompt, upto = self.apply(turn, generation_prompt=True), self.apply(turn + 1)
        start = self._agreement(prompt, upto)
        if start < len(prompt):
            # The generation prompt begins an answer (`<think>`) that this one does not begin with: the turn begins
            # where they part, at the end of a word or marker, but not in the messages before it.
            earliest = self._agreement(prompt, self.apply(turn))
            if start < earliest:
                raise UserError(
                    f"the chat template renders the messages before message {turn} differently once it follows, so the "
                    "tokens of the assistant cannot be told apart; give the tokenizer a chat template without that"
                )
            start = self._word_end(upto, start, earliest)
        return upto, start

    def find(self, upto: str, start: int, text: str) -> Span | None:
        """Where the turn that begins at `start` of `upto` stands in `text`; None if it is not there as generated.

        What closes a turn (a special token) may be another in a history, and carries no loss then.
        """
        end = self._agreement(upto, text)
        whole = end == len(upto) or (end > start and self.closing.fullmatch(upto, end))
        return (start, end) if end >= start and whole else None

    def _agreement(self, first: str, second: str) -> int:
        """Number of characters that both begin with, without a part of a marker that one of them has there."""
        length = _common_prefix(first, second)
        for text in (first, second):
            for marker in self.markers.finditer(text, max(0, length - 256), length + 256):
                if marker.start() < length < marker.end():
                    length = marker.start()
        return length

    def _word_end(self, text: str, start: int, earliest: int) -> int:
        while start > earliest and not (
            text[start - 1].isspace()
            or any(m.end() == start for m in self.markers.finditer(text, max(0, start - 256), start))
        ):
            start -= 1
        return start


def _apply(
    renderer: ChatRenderer, messages: list[Message], tools: list[dict[str, Any]] | None, generation_prompt: bool
) -> str:
    return _rendered(renderer, messages, tools, add_generation_prompt=generation_prompt)[0]


def _rendered(
    renderer: ChatRenderer, messages: list[Message], tools: list[dict[str, Any]] | None, **options: bool
) -> tuple[str, list[Span]]:
    """The text of a conversation, and what the template marks as generated, where `options` ask for that.

    `tokenizer.apply_chat_template` would leave out a content that is null, which some templates ask about.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**renderer.tokenizer.special_tokens_map, **(renderer.options or {}), **options}
    template = _FIXED_DATE + renderer.tokenizer.get_chat_template(tools=tools)
    rendered: Any = None
    with _errors_named(messages):
        rendered = render_jinja_template(
            [messages], tools=list(tools) if tools else None, chat_template=template, **variables
        )
    texts, generated = rendered
    return texts[0], [tuple(span) for span in generated[0]] if generated else []


class _errors_named:
    """Turns what a template raises into a :class:`UserError` with the roles that it was given."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.roles = [message["role"] for message in messages]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        from jinja2 import TemplateError

        if isinstance(error, (TemplateError, *_TEMPLATE_ERRORS)) and not isinstance(error, UserError):
            raise UserError(f"the chat template refuses the roles {self.roles}: {error}") from error


def _taken(
    renderer: ChatRenderer, messages: Sequence[Message], tools: list[dict[str, Any]] | None
) -> tuple[list[Message], str]:
    """The messages in the first spelling that the template renders, calls and tools included, and their text.

    Templates differ in how they want a message that has tool calls and no content (null, no field, empty text), and
    the arguments of a call (an object, or its JSON text). All mean the same.
    """
    bare = [{name: value for name, value in message.items() if name not in TRAINED} for message in messages]
    calls = {turn: message["tool_calls"] for turn, message in enumerate(bare) if "tool_calls" in message}
    empty = any(message["content"] is None for message in bare)
    errors = []
    for as_text in (False, True) if calls else (False,):
        for spelling in ("null", "absent", "empty") if empty else ("null",):
            spelled = [_spelled(message, spelling, as_text) for message in bare]
            try:
                text = _apply(renderer, spelled, tools, generation_prompt=False)
                _require_calls(text, calls)
            except UserError as error:
                errors.append(error)
            else:
                if tools and not any(name in text for tool in tools if (name := _tool_name(tool))):
                    raise UserError(
                        "the chat template does not render tools; use the tokenizer of a model that calls tools, or "
                        "leave the column out (columns.tools: '')"
                    )
                return spelled, text
    raise next((error for error in errors if "does not render" in str(error)), errors[0])


def _require_calls(text: str, calls: Mapping[int, list[dict[str, Any]]]) -> None:
    for turn, made in calls.items():
        if any(call["function"]["name"] not in text for call in made):
            raise UserError(
                f"the chat template does not render the tool calls of message {turn}; use the tokenizer of a model "
                "that calls tools"
            )


def _tool_name(tool: dict[str, Any]) -> str | None:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def _left_out(messages: Sequence[Message], texts: Mapping[int, str]) -> str:
    """Which message's text is not in the rendering (`texts` by message); empty where all are."""
    for position, message in enumerate(messages):
        content = message.get("content")
        if position in texts and isinstance(content, str):
            compact = _compact(texts[position])  # templates trim, and set thoughts on lines of their own
            spellings = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
            if not any(_compact(spelling) in compact for spelling in spellings):
                return f"message {position} ({message['role']})"
    return ""


def _compact(text: str) -> str:
    return "".join(text.split())


def _without_own_ends(
    renderer: ChatRenderer, messages: list[Message], text: str, tools: list[dict[str, Any]] | None
) -> tuple[list[Message], str]:
    """The messages, and their text, without a BOS or EOS of their own where the template writes one there too."""
    bos, eos = renderer.tokenizer.bos_token, renderer.tokenizer.eos_token
    stripped = [dict(message) for message in messages]
    first = stripped[0].get("content")
    if bos and isinstance(first, str) and first.startswith(bos) and text.startswith(bos):
        stripped[0]["content"] = first.removeprefix(bos)
    if eos and re.search(rf"{re.escape(eos)}\s*{re.escape(eos)}", text):
        for message in stripped:
            if message["role"] == "assistant" and isinstance(message.get("content"), str):
                message["content"] = message["content"].removesuffix(eos)
    if stripped == messages:
        return messages, text
    return stripped, _apply(renderer, stripped, tools, generation_prompt=False)


def _spelled(message: Message, empty_content: str, arguments_as_text: bool) -> Message:
    message = dict(message)
    if message["content"] is None and empty_content != "null":
        del message["content"]
        if empty_content == "empty":
            message["content"] = ""
    if arguments_as_text and "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    return [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]


def _one_of(texts: Any) -> re.Pattern[str]:
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _common_prefix(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high - 1:  # first[:low] is common, first[:high] is not
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
