"""Arguments that several commands have, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenseek.config import RunConfig, list_methods, load_config, may_lack_columns
from tokenseek.config.one_line import DEFAULT_METHOD
from tokenseek.config.resources import list_resources
from tokenseek.errors import UserError


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The configuration of a run; :func:`configuration` loads it."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--preset", metavar="NAME|PATH", help="a shipped preset (`tokenseek presets`) or a YAML file")
    group.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; may be given again"
    )
    return group


def add_model_and_data_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """A model and data by name alone, without a preset."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", metavar="M", help="a model's folder, or its name on the hub")
    group.add_argument(
        "--data", metavar="D", help="a file, a folder or a data set of the hub, whose format is recognised"
    )
    return group


def add_one_line_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """A model, data and a way to train by name alone, as :class:`tokenseek.config.OneLine` takes them."""
    group = add_model_and_data_arguments(parser)
    group.add_argument("--method", metavar="NAME", help=f"{', '.join(list_methods())} (default: {DEFAULT_METHOD})")
    return group


def add_subject_arguments(parser: argparse.ArgumentParser, sections: str) -> None:
    """A trained model, as :func:`tokenseek.evaluation.subject.find_subject` takes it; `sections` can be set."""
    group = parser.add_argument_group("model")
    group.add_argument("model", help="a run's folder, an adapter's or a model's, or a model's name on the hub")
    group.add_argument("--adapter", type=Path, metavar="FOLDER", help="an adapter to put on the model")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help=f"change a setting of {sections}, such as model.dtype=float32; may be given again",
    )


def configuration(args: argparse.Namespace) -> RunConfig:
    """What the arguments of :func:`add_config_arguments` ask for.

    Raises:
        UserError: an unknown preset, an unknown setting or a value that is not accepted.
    """
    return load_config(args.preset, args.set)


def require_columns(config: RunConfig) -> None:
    """Refuse local data without a column that the configuration names, before any process starts.

    A look at the first row decides whether the data are read for it, which takes heavy imports.

    Raises:
        UserError: a column is missing, or the data cannot be read.
    """
    for section, data in (("data", config.data), ("eval_data", config.eval_data)):
        for number, source in enumerate(data.sources if data else ()):
            if may_lack_columns(source):
                from tokenseek.data.rows import read_columns
                from tokenseek.data.sources import load_source

                key = f"{section}.sources.{number}"
                read_columns(source, load_source(source, key), key)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Which processes a command is launched in; the command itself does not see them."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--accelerate-config",
        default="single",
        metavar="NAME|PATH",
        help=f"processes and engine (default: single); shipped: {', '.join(list_resources('accelerate config'))}",
    )
    group.add_argument("--num-processes", type=positive, metavar="N", help="override the config's number of processes")
    parser.set_defaults(here=False)  # a command sets it for what needs no processes, such as a list


def without_launch_arguments(words: Sequence[str]) -> list[str]:
    """The words of a command line that the launched command sees: all but those of :func:`add_launch_arguments`."""
    parser = argparse.ArgumentParser(add_help=False)
    add_launch_arguments(parser)
    return parser.parse_known_args(list(words))[1]


def positive(text: str) -> int:
    """The type of a flag that takes a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def share(text: str) -> float:
    """The type of a flag that takes a share in (0, 1]."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share in (0, 1], such as 0.1")
    return ratio


def pair(text: str) -> tuple[float, float]:
    """The type of a flag that takes ALPHA,BETA."""
    try:
        alpha, beta = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ALPHA,BETA, such as 5,5") from None
    return alpha, beta


def part(text: str) -> tuple[int, int]:
    """The type of a flag that takes I/N: part I, from 0, of N parts."""
    try:
        number, parts = (int(number) for number in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/8") from None
    if not 0 <= number < parts:
        raise argparse.ArgumentTypeError(f"{text!r}: parts of {parts} are numbered 0 to {parts - 1}")
    return number, parts


def split_ratios(text: str) -> list[float]:
    """The shares of `--ratios`, with commas between."""
    try:
        ratios = [float(ratio) for ratio in text.split(",")]
    except ValueError:
        ratios = [0.0]
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise UserError(f"--ratios {text}: accepted are shares in (0, 1] with commas between, such as 0.1,0.5.")
    return ratios
