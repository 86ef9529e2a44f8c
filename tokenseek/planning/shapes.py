"""Models by name without a hub: their public dimensions, from shapes.yaml."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError

_FILE = Path(__file__).with_name("shapes.yaml")


@dataclass(frozen=True, eq=False)
class Shape:
    """A model's dimensions.

    Attributes:
        name: on the hub.
        parameters: as the vendor states them: a number, or one with few digits such as "20.91B".
        also: hub names of models with the same dimensions.
    """

    name: str
    parameters: int | str
    also: tuple[str, ...]
    model_type: str
    values: dict[str, object]

    @property
    def short(self) -> str:
        """Its name in a word, as `--shape` takes it."""
        return _short(self.name)

    def config(self) -> PreTrainedConfig:
        """Transformers' configuration of a model of this shape."""
        return AutoConfig.for_model(self.model_type, name_or_path=self.name, **self.values)


def known_shapes() -> tuple[Shape, ...]:
    """Every shape that `--shape` takes, once."""
    return tuple(dict.fromkeys(_by_name().values()))


def find_shape(name: str) -> Shape:
    """The shape of a hub name, or of its last part in any case ("llama-3.1-8b").

    Raises:
        UserError: there is none, with the nearest names.

    Example:
        >>> find_shape("llama-3.1-8b").config().num_hidden_layers
        32
    """
    if shape := known_shape(name):
        return shape
    names = sorted({shape.short for shape in known_shapes()})
    near = difflib.get_close_matches(_short(name), names, n=5, cutoff=0.4)
    raise UserError(
        f"--shape {name}: no such model; "
        + (f"nearest are {', '.join(near)}" if near else f"there are {', '.join(names)}")
        + ". For any other, name a folder with its config.json: --set model.name_or_path=FOLDER."
    )


def known_shape(name: str) -> Shape | None:
    """As :func:`find_shape`, None where there is none."""
    return _by_name().get(name.lower())


def _short(name: str) -> str:
    return name.rpartition("/")[2].lower()


@cache
def _by_name() -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, values in parse_yaml(_FILE.read_text(encoding="utf-8"), _FILE.name).items():
        values = dict(values)
        parameters, also = values.pop("parameters"), tuple(values.pop("also", ()))
        shape = Shape(name, parameters, also, values.pop("type"), values)
        for each in (name, *also):
            found |= {each.lower(): shape, _short(each): shape}
    return found
