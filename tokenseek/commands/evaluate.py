"""`tokenseek evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenseek.commands.arguments import add_subject_arguments
from tokenseek.evaluation.benchmarks import BENCHMARKS, HELD_OUT_LOSS, TABLE_1, runnable_tasks
from tokenseek.evaluation.subject import Subject, find_subject

HELP = "evaluate a run, an adapter or a model on the paper's benchmarks"
DESCRIPTION = "evaluate on the paper's benchmarks; starts `accelerate launch` underneath"
LAUNCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject_arguments(parser, "model or eval_data")
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        default=",".join(TABLE_1),
        metavar="A,B",
        help=f"accepted are {', '.join([*BENCHMARKS, HELD_OUT_LOSS])}; NAME:SHOTS changes the number of solved "
        "examples before each question (default: %(default)s)",
    )
    group.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="read local files instead of the hub's data sets; may be given again, the first folder with a file wins",
    )
    group.add_argument("--limit", type=int, metavar="N", help="first N examples of each task, of each MMLU subject")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="of each process (default: %(default)s)")
    group.add_argument("--seed", type=int, default=1234, help="seed for drawing solved examples (default: %(default)s)")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run programs that the model writes (humaneval)"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write the scores here (default: evaluation.json in a run's folder)"
    )
    group.add_argument("--samples", type=Path, metavar="FOLDER", help="write every prompt and answer here")


def check(args: argparse.Namespace) -> Subject:
    """The model to evaluate.

    Raises:
        UserError: there is no such model, or a task that cannot be run with what was given.
    """
    subject = find_subject(args.model, args.adapter, args.set)
    runnable_tasks(args.tasks, args.data, subject.held_out, args.allow_code_execution)
    return subject


def run(args: argparse.Namespace, subject: Subject) -> None:
    """Evaluate, print the scores and write them."""
    from tokenseek.evaluation.run import evaluate_subject  # late: mistakes are reported before torch is imported

    evaluate_subject(
        subject,
        args.tasks,
        data=args.data,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        allow_code_execution=args.allow_code_execution,
        json=args.json,
        samples=args.samples,
    )
