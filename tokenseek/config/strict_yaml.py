"""YAML without its traps: a key given twice is an error, `no` and `on` are words, and 4e-4 is a number."""

import re
from typing import Any

import yaml

from tokenseek.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain scalars of YAML 1.2, where only true/false are booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of one YAML document; `origin` (a file, an option) opens the message of every error.

    Raises:
        UserError: the text is not YAML, or a mapping holds a key twice (named by its dotted path and line).
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None
        _refuse_duplicates(node, "", origin)
        return _without_aliases(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {error}") from error


def _without_aliases(value: Any) -> Any:
    """A copy in which what an anchor names is there once for each of its aliases: changing one leaves the others."""
    if isinstance(value, dict):
        return {key: _without_aliases(item) for key, item in value.items()}
    return [_without_aliases(item) for item in value] if isinstance(value, list) else value


def _refuse_duplicates(node: yaml.Node, path: str, origin: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _refuse_duplicates(item, f"{path}.{position}".lstrip("."), origin)
    elif isinstance(node, yaml.MappingNode):
        first_line: dict[str, int] = {}
        for key, value in node.value:
            key_path, line = f"{path}.{key.value}".lstrip("."), key.start_mark.line + 1
            if key.value in first_line:
                raise UserError(
                    f"{origin}, line {line}: {key_path}: duplicate key, first given on line {first_line[key.value]}; "
                    "keep one of them"
                )
            first_line[key.value] = line
            _refuse_duplicates(value, key_path, origin)
