"""From a preset, its includes and `a.b=value` overrides to a checked configuration, and back to a file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tokenseek.config.explain import explain
from tokenseek.config.resources import find_resource, folder_of
from tokenseek.config.schema import DataOfModel, EvaluatedConfig, RunConfig
from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError

SchemaT = TypeVar("SchemaT", bound=BaseModel)
# Files that a source reads (`tokenseek.data.reading`).
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def recognised_data(path_or_name: str) -> dict[str, Any]:
    """The `data` section for one source of which nothing else is known: its format is recognised from its rows.

    Args:
        path_or_name: an existing file or folder, or a data set of the hub.
    """
    suffix = Path(path_or_name.lower().removesuffix(".gz")).suffix
    looks_local = path_or_name.startswith((".", "/", "~")) or suffix in _DATA_SUFFIXES
    is_local = looks_local or Path(path_or_name).exists()
    return {
        "sources": [{"path" if is_local else "name": path_or_name, "kind": "auto"}],
        "template": "auto",
        "rewritten_turns": "separate",
    }


def load_data_of_model(model: str, data: str, overrides: Sequence[str] = ()) -> DataOfModel:
    """The checked sections for a model's name or folder and :func:`recognised_data`; errors as in `load_config`."""
    values = {"model": {"name_or_path": model}, "data": recognised_data(data)}
    return _checked(DataOfModel, values, overrides, "command line")


def load_config(preset: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """A checked configuration from a preset (name or path) and `a.b=value` overrides, which are parsed as YAML.

    Example:
        >>> load_config("gsm8k", ["data.sources.0.path=train.jsonl", "selection.ratio=0.2"])

    Raises:
        UserError: names every violation with its dotted path, the accepted values and the nearest spelling.
    """
    values: dict[str, Any] = {}
    origin = "command line"
    if preset is not None:
        origin = str(preset)
        values = read_preset(preset)
    return _checked(RunConfig, values, overrides, origin)


def override_config(config: RunConfig, settings: Mapping[str, Any], origin: str = "settings") -> RunConfig:
    """The configuration with some settings changed, by their dotted paths.

    Example:
        >>> override_config(config, {"selection.alpha": 1, "selection.beta": 0})

    Raises:
        UserError: names every violation, as `load_config` does.
    """
    values = config.model_dump(mode="json", exclude_unset=True)  # what was left out may depend on what is changed
    for key, value in settings.items():
        _set_dotted(values, key, value, origin)
    return checked_values(RunConfig, values, origin)


def load_evaluated(name_or_path: str, overrides: Sequence[str] = ()) -> EvaluatedConfig:
    """The checked sections of a model to evaluate; `overrides` and errors are those of :func:`load_config`."""
    return _checked(EvaluatedConfig, {"model": {"name_or_path": name_or_path}}, overrides, "command line")


def _checked(schema: type[SchemaT], values: dict[str, Any], overrides: Iterable[str], origin: str) -> SchemaT:
    return checked_values(schema, change_values(values, overrides), origin)


def change_values(
    values: dict[str, Any], overrides: Iterable[str], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Values with `a.b=value` overrides and then settings by their dotted paths; changed in place, and returned."""
    for override in overrides:
        _apply_override(values, override)
    for key, value in (settings or {}).items():
        _set_dotted(values, key, value, "settings")
    return values


def checked_values(schema: type[SchemaT], values: dict[str, Any], origin: str) -> SchemaT:
    """Values as the sections of `schema`; errors as in :func:`load_config`, opened by `origin`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = explain(error, values, schema)
        raise UserError(f"{origin}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems)) from error


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Writes every setting of a run, defaults included, as a preset that `load_config` reads back unchanged."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def read_preset(name_or_path: str | Path) -> dict[str, Any]:
    """The values of a preset and of what it includes, unchecked."""
    return _read_preset(find_resource("preset", name_or_path), including=())


def _read_preset(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """The merged mapping of a preset and of what it includes; later files win, the preset's own keys win last."""
    if path in including:
        raise UserError("presets include each other: " + " -> ".join(str(p) for p in (*including, path)))
    own = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(own, dict):
        raise UserError(f"{path}: a preset is a mapping of sections, got a {type(own).__name__}")
    includes = own.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{path}: include: a list of file names is accepted, got {includes!r}")
    merged: dict[str, Any] = {}
    for name in includes:
        found = [folder / name for folder in (path.parent, folder_of("preset")) if (folder / name).is_file()]
        if not found:
            raise UserError(f"{path}: include: no file {name!r} beside it or in {folder_of('preset')}")
        merged = merge_values(merged, _read_preset(found[0].resolve(), (*including, path)))
    return merge_values(merged, own)


def merge_values(base: dict[str, Any], winner: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in winner.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge_values(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}: write section.key=value, such as --set training.learning_rate=1e-4")
    _set_dotted(values, key, parse_yaml(text, f"--set {key}"), f"--set {override}")


def _set_dotted(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Sets one dotted key in place; numbers step into lists, and the number after the last item appends one."""
    steps = key.split(".")
    node: Any = values
    for depth, step in enumerate(steps):
        here = ".".join(steps[:depth]) or "the configuration"
        if isinstance(node, list):
            if not step.isdigit() or int(step) > len(node):
                raise UserError(
                    f"{origin}: {here} is a list; accepted are the positions 0 to {len(node)}, got {step!r}"
                )
            if int(step) == len(node):
                node.append(None)
        elif not isinstance(node, dict):
            raise UserError(f"{origin}: {here} is the value {node!r} and has no keys")
        at: Any = int(step) if isinstance(node, list) else step
        if depth == len(steps) - 1:
            node[at] = value
            return
        if (node[at] if isinstance(node, list) else node.get(at)) is None:
            node[at] = [] if steps[depth + 1].isdigit() else {}
        node = node[at]
