"""What is wrong with a configuration, a line for each mistake: its dotted path, what is accepted, what was meant."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

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
                f"unknown key; accepted keys: {', '.join(accepted)}{_meant_key(str(key), parents, accepted, schema)}"
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


def _meant_key(key: str, parents: Sequence[int | str], accepted: Sequence[str], schema: type[BaseModel]) -> str:
    """`'; did you mean X?'`: the setting of that name elsewhere (`training.max_steps`), or a near name here."""
    elsewhere = [path for path in _settings(schema) if path.rpartition(".")[2] == key]
    if parents:
        elsewhere = [path for path in elsewhere if path.startswith(f"{parents[0]}.")] or elsewhere
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(key, accepted)


def _settings(section: type[BaseModel]) -> Iterator[str]:
    """The dotted path of every setting that is no section, as `--set` takes it; of a list of sections, its first."""
    for name, field in section.model_fields.items():
        inner, is_list = _section_in(field.annotation)
        if inner is None:
            yield name
        else:
            yield from (f"{name}.0.{path}" if is_list else f"{name}.{path}" for path in _settings(inner))


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
            inner, _ = _section_in(section.model_fields[step].annotation)
            assert inner is not None, f"{step} is a value, and pydantic names keys of sections alone"
            section = inner
    return section


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section class inside `Section | None` or `list[Section]`, if any, and whether it is in a list."""
    if get_origin(annotation) is None:
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        return annotation if is_section else None, False
    for inner in get_args(annotation):
        section, is_list = _section_in(inner)
        if section:
            return section, is_list or get_origin(annotation) is list
    return None, False
