"""What is wrong with a configuration, a line for each mistake: its dotted path, what is accepted, what was meant."""

import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tokenseek.spelling import did_you_mean


def explain(error: ValidationError, values: dict[str, Any], schema: type[BaseModel]) -> list[str]:
    """One line per violation. The members of a union that all refuse one value share a line."""
    problems: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        loc: Sequence[int | str] = item["loc"]
        if item["type"] in ("extra_forbidden", "missing"):
            *parents, key = loc
            accepted = sorted(_section_at(parents, schema).model_fields)
            message = (
                f"unknown key; accepted keys: {', '.join(accepted)}{did_you_mean(key, accepted)}"
                if item["type"] == "extra_forbidden"
                else "required, but not given"
            )
        else:
            loc = _steps_in(values, loc)
            message = str(item.get("ctx", {}).get("error") or item["msg"].replace("Input should", "should"))
            if item["type"] != "value_error":
                message += f", got {item['input']!r}"
            if item["type"] == "literal_error":
                message += did_you_mean(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        problems.setdefault(".".join(map(str, loc)), []).append(message)
    return [_with_path(path, " or ".join(dict.fromkeys(messages))) for path, messages in problems.items()]


def _with_path(path: str, message: str) -> str:
    """`path: message`, where the message (of SelectionRule, say) does not open with its dotted path already."""
    return message if not path or message.startswith(f"{path}.") else f"{path}: {message}"


def _steps_in(values: Any, loc: Sequence[int | str]) -> list[int | str]:
    """The part of a pydantic location that exists in the data: the rest are names of union members."""
    steps: list[int | str] = []
    for step in loc:
        if not (isinstance(values, dict) and step in values or isinstance(values, list) and isinstance(step, int)):
            break
        values = values[step]  # type: ignore[index]  # a list has numbers, as was checked
        steps.append(step)
    return steps


def _section_at(loc: Sequence[int | str], section: type[BaseModel]) -> type[BaseModel]:
    for step in loc:
        if isinstance(step, str):
            section = _section_in(section.model_fields[step].annotation)
    return section


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section class inside `Section | None` or `list[Section]`."""
    while get_origin(annotation) in (list, Annotated, Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not types.NoneType)
    section: type[BaseModel] = annotation
    return section
