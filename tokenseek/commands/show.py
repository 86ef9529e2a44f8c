"""`tokenseek show`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from tokenseek.commands.arguments import add_config_arguments, configuration
from tokenseek.config import RunConfig
from tokenseek.errors import UserError
from tokenseek.evaluation.subject import runs_near

HELP = "show an index, and the selected tokens of its examples"
DESCRIPTION = HELP
LAUNCHED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = add_config_arguments(parser)
    group.add_argument(
        "folder", nargs="?", type=Path, metavar="RUN", help="a run's folder, whose config.yaml stands for --preset"
    )
    group = parser.add_argument_group("examples")
    group.add_argument("--row", type=int, action="append", metavar="N", help="an example; may be given again")
    group.add_argument("--random", type=int, default=0, metavar="N", help="add N examples at random")
    group = parser.add_argument_group("output")
    group.add_argument("--no-color", action="store_true", help="mark with brackets instead of colours")
    group.add_argument("--html", type=Path, metavar="FILE", help="write one page with sliders for r, alpha and beta")
    group.add_argument("--figures", type=Path, metavar="FOLDER", help="write attention and gradient maps as PNG, SVG")
    group.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="a training run to compare in figures; may be given again",
    )


def check(args: argparse.Namespace) -> RunConfig | None:
    """The configuration, or none where figures of training runs are all that is asked for.

    Raises:
        UserError: the folder is no run, the run has no index, or flags that exclude each other.
    """
    if args.run_folder and not args.figures:
        raise UserError("--run compares training runs in figures: give --figures FOLDER too.")
    if args.folder:
        args.preset = _config_of(args.folder, args.preset)
    elif args.run_folder and not args.preset and not args.set:
        return None
    config = configuration(args)
    _require_index(config, args)
    return config


def _config_of(folder: Path, preset: str | None) -> str:
    if preset:
        raise UserError(f"{folder} and --preset {preset}: give one of them.")
    if not (folder / "config.yaml").is_file():
        what = f"{folder} is no run: it has no config.yaml" if folder.exists() else f"there is no folder {folder}"
        raise UserError(f"{what}{runs_near(folder)}")
    return str(folder / "config.yaml")


def _require_index(config: RunConfig, args: argparse.Namespace) -> None:
    if config.index_path.exists():
        return
    words = ["tokenseek", "score", *(["--preset", args.preset] if args.preset else [])]
    words += [word for setting in args.set for word in ("--set", setting)]
    why = ""
    if config.scoring.mode == "online":
        why = ": the run selects its tokens in each training step (scoring.mode: online), which leaves none"
    raise UserError(f"there is no index {config.index_path}{why}. Make one, then show it:\n  {shlex.join(words)}")


def run(args: argparse.Namespace, config: RunConfig | None) -> None:
    """Print what the index holds; write the page and the figures that are asked for."""
    from tokenseek.runs.show import show, show_runs  # late: mistakes are reported before torch is imported

    if config is not None:
        color = sys.stdout.isatty() and not args.no_color
        for line in show(config, args.row or [], args.random, html=args.html, figures=args.figures, color=color):
            print(line)
    if args.run_folder:
        for line in show_runs(args.run_folder, args.figures):
            print(line)
