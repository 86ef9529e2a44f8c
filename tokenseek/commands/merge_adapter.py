"""`tokenseek merge-adapter`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "merge a trained adapter into its base model"
DESCRIPTION = HELP
LAUNCHED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of the adapter, such as RUN/final")
    parser.add_argument("output", type=Path, help="folder for the merged model")
    parser.add_argument("--base", help="base model, if it is not where the adapter says")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the base model's")


def check(args: argparse.Namespace) -> None:
    """The folders are checked by the run, which needs no process of its own."""


def run(args: argparse.Namespace, checked: None) -> None:
    """Write the base model with the adapter added to its weights."""
    from tokenseek.runs.export import merge_adapter  # late: needs torch

    merge_adapter(args.adapter, args.output, args.dtype, args.base)
    print(f"merged model: {args.output}")
