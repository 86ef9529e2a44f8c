"""`tokenseek train`."""

from __future__ import annotations

import argparse

from tokenseek.commands.arguments import (
    add_config_arguments,
    add_one_line_arguments,
    configuration,
    require_columns,
    share,
)
from tokenseek.config import OneLine, RunConfig, load_one_line

HELP = "fine-tune on selected tokens"
DESCRIPTION = (
    f"{HELP}: --model and --data are enough, a --preset says more; scores the data first where a preset asks for an "
    "index and there is none; starts `accelerate launch` underneath"
)
LAUNCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = add_one_line_arguments(parser)
    group.add_argument("--output", metavar="FOLDER", help="where the run is written (default: runs/<model>-<data>)")
    group.add_argument("--ratio", type=share, metavar="R", help="the share of the tokens to train on (default: 0.1)")
    add_config_arguments(parser)


def check(args: argparse.Namespace) -> RunConfig:
    """The configuration, from a model and data or from a preset.

    Raises:
        UserError: an unknown method or setting, a value that is not accepted, a column that the data lack, or packed
            weights that the engine of the launch cannot split.
    """
    words = _words(args)
    one_line = words and load_one_line(words, args.preset, args.set, on_cpu=lambda: _on_cpu(args))
    config = one_line or configuration(args)
    launched_with = getattr(args, "accelerate_config", None)  # in a launched process there is no such argument
    if config.model.quantization and launched_with is not None:
        from tokenseek.launching.engine import require_splittable_by  # late: it imports torch

        require_splittable_by(launched_with, config.model.quantization)
    require_columns(config)
    return config


def run(args: argparse.Namespace, config: RunConfig) -> None:
    """Fine-tune; with a model and data alone, what is about to happen is logged first."""
    from tokenseek.runs.train import train  # late: a mistake in the configuration is reported before torch is imported

    train(config, outlined=bool(_words(args)))


def _words(args: argparse.Namespace) -> OneLine:
    return OneLine(args.model, args.data, args.method, args.output, args.ratio)


def _on_cpu(args: argparse.Namespace) -> bool:
    """Whether the processes of this command, or the one that asks, train on CPUs."""
    from tokenseek.launching.environment import trains_on_cpu  # late: it imports torch

    launched_with = getattr(args, "accelerate_config", None)
    if launched_with is None:
        return trains_on_cpu()
    from tokenseek.launching.engine import read_engine

    return read_engine(launched_with, args.num_processes).on_cpu or trains_on_cpu()
