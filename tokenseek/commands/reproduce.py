"""`tokenseek reproduce`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from tokenseek.commands.arguments import add_config_arguments, positive
from tokenseek.config import RunConfig
from tokenseek.config.resources import list_resources
from tokenseek.evaluation.benchmarks import runnable_tasks
from tokenseek.sweeps.paper import PaperTable, TableRow, load_table, row_settings, table_config

HELP = "run a table of the paper for a model and data set"
DESCRIPTION = f"{HELP}; the processes of `accelerate launch` take runs of their own"
LAUNCHED = True


class Reproduction(NamedTuple):
    """A table, those of its rows that are asked for, and the configuration that they share."""

    table: PaperTable
    rows: list[TableRow]
    config: RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", help=f"accepted are {', '.join(list_resources('table'))}")
    add_config_arguments(parser)
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--paper", metavar="MODEL", help="whose figures stand beside the measured ones (default: the table's first)"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="train on N examples only")
    group.add_argument("--steps", type=positive, metavar="N", help="train for N steps only")
    group.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each row (default: 1)")
    group.add_argument(
        "--hold-out",
        type=positive,
        default=100,
        metavar="N",
        help="training examples for the held-out loss, where there is no eval_data (default: %(default)s)",
    )
    group.add_argument("--rows", metavar="A,B", help="run these rows only (`--list` names them)")
    group.add_argument("--extra-data", type=Path, metavar="FILE", help="texts in place of MiniPile's (Table S6)")
    group.add_argument(
        "--list",
        dest="here",
        action="store_true",
        help="name the rows, with what they change, and run nothing",
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--tasks", metavar="A,B", help="evaluate every run, as `tokenseek evaluate` does (default: held-out loss only)"
    )
    group.add_argument("--data", type=Path, action="append", default=[], metavar="FOLDER", help="as for `evaluate`")
    group.add_argument("--eval-limit", type=positive, metavar="N", help="the first N examples of each task")


def check(args: argparse.Namespace) -> Reproduction:
    table = load_table(args.table)
    config = table_config(table, args.preset, args.set, paper=args.paper, limit=args.limit)
    if args.tasks:
        runnable_tasks(args.tasks, args.data, config.eval_data, allow_code_execution=False)
    rows = table.choose(args.rows)
    if not args.here:
        table.require_measurable(rows, config, args.seeds, args.tasks)
    return Reproduction(table, rows, config)


def run(args: argparse.Namespace, checked: Reproduction) -> None:
    table, rows, config = checked
    if args.here:
        print("\n".join(f"{row.name}: {row.label}: {row_settings(row, config)}" for row in rows))
        return
    from tokenseek.sweeps.reproduce import reproduce  # late: mistakes are told before torch is imported

    reproduce(
        args.table,
        table,
        config,
        rows=rows,
        seeds=args.seeds,
        steps=args.steps,
        hold_out=args.hold_out,
        paper=args.paper,
        extra_data=args.extra_data,
        tasks=args.tasks,
        data=args.data,
        eval_limit=args.eval_limit,
    )
