"""Messages of conversations as data sets write them, in the one form that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from tokenseek.errors import UserError

Message = dict[str, Any]

# Who speaks in ShareGPT's `from`, and the role that chat templates know.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
# Fields of a message that say whether it carries a loss.
TRAINED = ("train", "weight")


def read_messages(cell: Any, system: Any = None) -> list[Message]:
    """A conversation as messages with `role` and `content`, from these or from ShareGPT's `from` and `value`.

    Fields that are null are left out, `content` excepted; parts of text become one text; arguments of tool calls are
    objects, as chat templates expect them.

    Args:
        cell: a list of messages, or its JSON text.
        system: text of a system message to begin with.

    Raises:
        UserError: names the message and what is wrong with it.
    """
    if isinstance(cell, str):
        cell = _parsed(cell)
    if not isinstance(cell, list) or not cell:
        raise UserError("accepted is a list of messages, each with role and content (or from and value)")
    messages = [_message(message, position) for position, message in enumerate(cell)]
    if isinstance(system, str) and system:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"] != system:
            raise UserError("there is a system message and a system column with another text; leave out one of them")
    return messages


def read_tools(cell: Any) -> list[dict[str, Any]] | None:
    """The tools of a conversation, from a list of JSON schemas or its JSON text; None where there are none."""
    if isinstance(cell, str):
        cell = _parsed(cell) if cell.strip() else None
    if isinstance(cell, dict):
        cell = [cell]
    if cell is not None and not (isinstance(cell, list) and all(isinstance(tool, dict) for tool in cell)):
        raise UserError(f"accepted as tools is a list of JSON schemas, got {cell!r:.80}")
    return cell or None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _message(given: Any, position: int) -> Message:
    where = f"message {position}"
    if not isinstance(given, dict):
        raise UserError(f"{where} is {given!r:.80}; accepted are messages with role and content (or from and value)")
    message = {name: value for name, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str) or (given.get("role") is not None and "from" in message):
        raise UserError(
            f"{where} has the keys {sorted(message)}; accepted are messages with role and content (or from and value)"
        )
    where += f" ({message['role']})"
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = [_tool_call(call, where) for call in _listed(message["tool_calls"], where)]
    message["content"] = _content(message.get("content"), where)
    if not message["content"] and "tool_calls" in message:
        message["content"] = None  # two ways to say that there are calls only
    if message["content"] is None and not any(
        message.get(field) for field in ("tool_calls", "reasoning_content", "thinking")
    ):
        raise UserError(f"{where} has no content; give text, or drop the conversation")
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = message.pop("from")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{where} is from {speaker!r}; accepted are {', '.join(_SHAREGPT_ROLES)}")
    value = message.pop("value", None)
    if speaker == "function_call":
        calls = _parsed(value) if isinstance(value, str) else value
        if not isinstance(calls, dict | list):
            raise UserError(f"{where} is a function_call, whose value is the JSON text of name and arguments")
        return {"role": role, "tool_calls": calls, **message}
    return {"role": role, "content": value, **message}


def _listed(calls: Any, where: str) -> list[Any]:
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if isinstance(calls, dict):
        return [calls]
    if not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls is no list of calls")
    return calls


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """The call with `function`, whose arguments are an object."""
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call has a function with name and arguments, got {call!r:.80}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and isinstance(parsed := _parsed(arguments), dict):
        arguments = parsed
    kept = {name: value for name, value in call.items() if value is not None}
    return {"type": "function", **kept, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if not isinstance(content, list):
        raise UserError(f"{where}: content is {content!r:.80}; accepted is text, or a list of parts of type text")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where} has a part of type {kind!r}; TokenSeek trains on text, so only parts of type text"
            )
        texts.append(part["text"])
    return "".join(texts)


def own_wish(message: Message, position: int) -> bool | None:
    """What a message says about its own loss."""
    given = [message[field] for field in TRAINED if field in message]
    for value in given:
        if value not in (0, 1):  # true and false are these too
            raise UserError(f"message {position}: train or weight is {value!r}; accepted are true, false, 1 and 0")
    return bool(min(given)) if given else None
