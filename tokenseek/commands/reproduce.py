"""`tokenseek reproduce`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tokenseek.commands.arguments import add_config_arguments, positive
from tokenseek.config import RunConfig, load_config
from tokenseek.config.resources import list_resources
from tokenseek.errors import UserError
from tokenseek.evaluation.benchmarks import require_harness, runnable_tasks
from tokenseek.sweeps.paper import (
    TRANSLATION,
    PaperTable,
    TableRow,
    load_table,
    require_here,
    row_settings,
    table_config,
)

HELP = "run a table or figure of the paper for a model and data set, or all of them on what is here"
DESCRIPTION = f"{HELP}; the processes of `accelerate launch` take runs of their own"
LAUNCHED = True


class Reproduction(NamedTuple):
    """A table, those of its rows that are asked for, and the configuration that they share."""

    table: PaperTable
    rows: list[TableRow]
    config: RunConfig


class WholePaper(NamedTuple):
    """`--here`: the configuration that all tables share, and the names of those that are asked for."""

    config: RunConfig
    tables: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", nargs="?", help=f"accepted are {', '.join(list_resources('table'))}")
    group = parser.add_argument_group("the whole paper")
    group.add_argument(
        "--here",
        dest="whole_paper",
        action="store_true",
        help="run every table and figure on a small model and the data of this machine, and write a page; "
        "may be stopped and started again",
    )
    group.add_argument("--tables", metavar="A,B", help="with --here: these only")
    group.add_argument("--no-run", action="store_true", help="with --here: write the page of what has been run")
    group.add_argument(
        "--measured", type=Path, metavar="FILE", help="with --here: write the page of the rows of a here.jsonl"
    )
    group.add_argument("--page", type=Path, metavar="FOLDER", help="with --here: of the page (default: output_dir)")
    add_config_arguments(parser)
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--paper", metavar="MODEL", help="whose figures the table shows beside the measured ones (default: the first)"
    )
    group.add_argument("--limit", type=positive, metavar="N", help="train on N examples only (--here: 320)")
    group.add_argument("--steps", type=positive, metavar="N", help="train for N steps only")
    group.add_argument("--seeds", type=positive, metavar="N", help="runs of each row (default: 1; --here: 3)")
    group.add_argument(
        "--hold-out",
        type=positive,
        metavar="N",
        help="training examples for the held-out loss, where there is no eval_data (default: 100); with --here test "
        "problems (default: 48)",
    )
    group.add_argument("--rows", metavar="A,B", help="run these rows only (`--list` names them)")
    group.add_argument("--extra-data", type=Path, metavar="FILE", help="texts in place of MiniPile's (Table S6)")
    group.add_argument(
        "--list",
        action="store_true",
        help="name the rows, with what they change, and run nothing",
    )
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--tasks", metavar="A,B", help="evaluate every run, as `tokenseek evaluate` does (default: held-out loss only)"
    )
    group.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="as for `evaluate`; --here finds GSM8K there, too",
    )
    group.add_argument("--eval-limit", type=positive, metavar="N", help="the first N examples of each task")


def check(args: argparse.Namespace) -> Reproduction | WholePaper:
    """The table with its rows and configuration; with ``--here`` the configuration and names of tables.

    Raises:
        UserError: an unknown table, row or task, or flags that exclude each other.
    """
    if args.whole_paper:
        return _check_whole_paper(args)
    for option in ("tables", "no_run", "measured", "page"):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} goes with --here")
    if args.table is None:
        raise UserError(f"give a table, or --here for all; accepted are {', '.join(list_resources('table'))}")
    args.seeds, args.hold_out = args.seeds or 1, args.hold_out or 100
    table = load_table(args.table)
    config = table_config(table, args.preset, args.set, paper=args.paper, limit=args.limit)
    if args.tasks:
        runnable_tasks(args.tasks, args.data, config.eval_data, allow_code_execution=False)
    rows = table.choose(args.rows)
    if args.list:
        args.here = True
    else:
        table.require_measurable(rows, config, args.seeds, args.tasks)
    return Reproduction(table, rows, config)


def _check_whole_paper(args: argparse.Namespace) -> WholePaper:
    if args.table:
        raise UserError(f"--here runs every table; for {args.table} alone give --tables {args.table}")
    if args.rows or args.paper or args.extra_data:
        raise UserError("--rows, --paper and --extra-data go with a table, not with --here")
    config = load_config(args.preset or "here", args.set)
    names = args.tables.split(",") if args.tables else []
    for name in names:
        require_here(name)
    if args.tasks:
        runnable_tasks(args.tasks, args.data, config.eval_data, allow_code_execution=False)
    if args.measured and not args.measured.is_file():
        raise UserError(f"--measured {args.measured}: there is no such file; `reproduce --here` writes one")
    for folder in args.data:
        if not folder.is_dir():
            raise UserError(f"--data {folder}: there is no such folder")
    if args.list or args.no_run or args.measured:
        args.here = True  # no process is needed
        return WholePaper(config, names)
    if TRANSLATION in (names or [TRANSLATION]):
        require_harness(f"table {TRANSLATION} is judged by BLEU; name other tables with --tables, or install lm-eval")
    if args.preset is None and not Path(config.model.name_or_path).is_dir():
        raise UserError(
            f"model.name_or_path: there is no folder {config.model.name_or_path}; make it with `python "
            "launch/quickstart.py prepare quickstart`, or name another model with --set model.name_or_path=FOLDER"
        )
    return WholePaper(config, names)


def run(args: argparse.Namespace, checked: Reproduction | WholePaper) -> None:
    """Run and print what was checked, or list it."""
    if isinstance(checked, WholePaper):
        return _run_whole_paper(args, checked)
    table, rows, config = checked
    if args.list:
        print("\n".join(f"{row.name}: {row.label}: {row_settings(row, config)}" for row in rows))
        return
    from tokenseek.sweeps.reproduce import reproduce  # late: mistakes are reported before torch is imported

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


def _run_whole_paper(args: argparse.Namespace, checked: WholePaper) -> None:
    from tokenseek.sweeps.reproduce_here import HereOptions, list_here, run_here  # late, as above
    from tokenseek.sweeps.reproduce_page import page_of_file

    config, tables = checked
    options = HereOptions(
        folders=args.data, tasks=args.tasks, eval_limit=args.eval_limit, tables=tables, steps=args.steps
    )
    given = {name: getattr(args, name) for name in ("limit", "seeds", "hold_out") if getattr(args, name)}
    options = replace(options, **given)
    if args.list:
        print("\n".join(list_here(config, options)))
        return
    file = args.measured or run_here(config, options, run=not args.no_run)
    if file:
        for path in page_of_file(file, args.page or Path(config.output_dir)):
            print(f"page: {path}")
