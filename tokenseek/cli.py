"""The ``tokenseek`` command, and what the scripts in ``launch/`` share with it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenseek.config.resources import find_resource, list_resources, resolve_accelerate_config
from tokenseek.config.schema import RunConfig, load_config
from tokenseek.config.sizes import parse_size
from tokenseek.errors import UserError
from tokenseek.evaluation.benchmarks import BENCHMARKS, HELD_OUT_LOSS, TABLE_1, runnable_tasks
from tokenseek.evaluation.subject import Subject, find_subject
from tokenseek.sweeps.paper import PaperTable, TableRow, load_table, row_settings, table_config

if TYPE_CHECKING:
    from tokenseek.sweeps.tune import Grid

USAGE_ERROR = 2
# How long a process leaves it to the main one to tell an error; the launcher ends it as soon as the main one has.
_SECONDS_TO_MAIN_PROCESS = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tokenseek", description="Fine-tune language models on the tokens that matter."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    for name, text in (
        ("score", "score every token of a data set and write its index"),
        ("train", "fine-tune on selected tokens (scores first where there is no index)"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text}; starts `accelerate launch` underneath")
        add_run_arguments(command)
        if name == "score":
            add_part_argument(command)
        _add_launch_arguments(command)
        command.set_defaults(run=_launch)

    for name, text in (
        ("tune", "choose alpha, beta and r by the loss on held-out data"),
        ("reproduce", "run a table of the paper for a model and data set"),
    ):
        command = commands.add_parser(
            name, help=text, description=f"{text}; the processes of `accelerate launch` take runs of their own"
        )
        _SWEEP_ARGUMENTS[name](command)
        _add_launch_arguments(command)
        command.set_defaults(run=_launch_sweep)

    command = commands.add_parser("merge", help="merge the shards of parts scored one by one (`score --part`)")
    add_run_arguments(command)
    command.set_defaults(run=_merge)

    command = commands.add_parser(
        "plan",
        help="tell the peak memory and the time of a run's steps, without its weights, its data or a GPU",
        description="tell the peak memory per device of a training step, and estimate its time, from its code run on "
        "tensors without data",
    )
    add_run_arguments(command)
    command.add_argument(
        "--accelerate-config",
        action="append",
        metavar="NAME|PATH",
        help=f"may be given again (default: single); shipped: {', '.join(list_resources('accelerate config'))}",
    )
    command.add_argument("--num-processes", type=int, metavar="N", help="override the configs' number of processes")
    command.add_argument("--ratios", default="0.1,0.3,0.5", metavar="R,R", help="shares of the tokens to compare")
    command.add_argument("--tokens", type=int, metavar="T", help="length of an example (default: data.max_length)")
    command.add_argument("--budget", metavar="SIZE", help="find the largest share that fits, in 8GiB for one")
    command.add_argument("--gpu", metavar="NAME", help="estimate seconds on it too: H100, A100-80, L40S, RTX4090, ...")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the plans, in bytes, here too")
    command.set_defaults(run=_plan)

    command = commands.add_parser("show", help="show an index, and the selected tokens of its examples")
    add_run_arguments(command)
    command.add_argument("--row", type=int, action="append", metavar="N", help="an example; may be given again")
    command.add_argument("--random", type=int, default=0, metavar="N", help="add N examples at random")
    command.add_argument("--no-color", action="store_true", help="mark with brackets instead of colours")
    command.add_argument("--html", type=Path, metavar="FILE", help="write one page with sliders for r, alpha and beta")
    command.add_argument("--figures", type=Path, metavar="FOLDER", help="write attention and gradient maps as PNG, SVG")
    command.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="a training run to compare in figures; may be given again",
    )
    command.set_defaults(run=_show)

    command = commands.add_parser(
        "evaluate",
        help="evaluate a run, an adapter or a model on the paper's benchmarks",
        description="evaluate on the paper's benchmarks; starts `accelerate launch` underneath",
    )
    add_evaluate_arguments(command)
    _add_launch_arguments(command)
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("merge-adapter", help="merge a trained adapter into its base model")
    command.add_argument("adapter", type=Path, help="folder of the adapter, such as RUN/final")
    command.add_argument("output", type=Path, help="folder for the merged model")
    command.add_argument("--base", help="base model, where it is not at the place that the adapter names")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the base model's")
    command.set_defaults(run=_merge_adapter)

    command = commands.add_parser("presets", help="list the shipped presets")
    command.set_defaults(run=lambda args: print("\n".join(list_resources("preset"))))

    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    args.words = argv[1:]
    return guarded(lambda: args.run(args))


def run_script(name: str, run: Callable[[argparse.Namespace, RunConfig | Subject], object]) -> int:
    """What a script in ``launch/`` does: parse its arguments, load the configuration, run."""
    parser = argparse.ArgumentParser(
        prog=f"accelerate launch launch/{name}.py", description=f"tokenseek {name}, inside `accelerate launch`"
    )
    if name == "evaluate":
        add_evaluate_arguments(parser)
        args = parser.parse_args()
        return guarded(lambda: run(args, _subject(args)))
    if name in _SWEEP_ARGUMENTS:
        _SWEEP_ARGUMENTS[name](parser)
        args = parser.parse_args()
        return guarded(lambda: run(args, None if name == "reproduce" else load_config(args.preset, args.set)))
    add_run_arguments(parser)
    if name == "score":
        add_part_argument(parser)
    args = parser.parse_args()
    return guarded(lambda: run(args, load_config(args.preset, args.set)))


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accelerate-config",
        default="single",
        metavar="NAME|PATH",
        help=f"processes and engine (default: single); shipped: {', '.join(list_resources('accelerate config'))}",
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="override the config's number of processes")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="NAME|PATH", help="a shipped preset (`tokenseek presets`) or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; may be given again"
    )


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run's folder, an adapter's or a model's, or a model's name on the hub")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="an adapter to put on the model")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="change a setting of model or eval_data, such as model.dtype=float32; may be given again",
    )
    parser.add_argument(
        "--tasks",
        default=",".join(TABLE_1),
        metavar="A,B",
        help=f"accepted are {', '.join([*BENCHMARKS, HELD_OUT_LOSS])}; NAME:SHOTS changes the number of solved "
        "examples before each question (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="read local files instead of the hub's data sets; may be given again, the first folder with a file wins",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N examples of each task, of each MMLU subject")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of each process (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of drawing solved examples (default: %(default)s)")
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="run programs that the model writes (humaneval)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the scores here (default: evaluation.json in a run's folder)"
    )
    parser.add_argument("--samples", type=Path, metavar="FOLDER", help="write every prompt and answer here")


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--weights",
        type=_pair,
        action="append",
        metavar="ALPHA,BETA",
        help="to try; may be given again (default: the paper's 1,0 0,1 5,5 7,3 3,7)",
    )
    parser.add_argument("--ratios", metavar="R,R", help="shares of the tokens to try (default: the preset's)")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=50, metavar="N", help="of each run (default: %(default)s)")
    parser.add_argument(
        "--hold-out",
        type=_positive,
        default=100,
        metavar="N",
        help="training examples that decide, where there is no eval_data (default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="NATS",
        help="choose the smallest r whose loss is above the least by this at most (default: %(default)s)",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="the preset (default: tune/preset.yaml of the run)")


def add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", help=f"accepted are {', '.join(list_resources('table'))}")
    add_run_arguments(parser)
    parser.add_argument(
        "--paper", metavar="MODEL", help="whose figures stand beside the measured ones (default: the table's first)"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="train on N examples only")
    parser.add_argument("--steps", type=_positive, metavar="N", help="train for N steps only")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs of each row (default: 1)")
    parser.add_argument(
        "--hold-out",
        type=_positive,
        default=100,
        metavar="N",
        help="training examples for the held-out loss, where there is no eval_data (default: %(default)s)",
    )
    parser.add_argument("--rows", metavar="A,B", help="run these rows only (`--list` names them)")
    parser.add_argument("--list", action="store_true", help="name the rows, with what they change, and run nothing")
    parser.add_argument(
        "--tasks", metavar="A,B", help="evaluate every run, as `tokenseek evaluate` does (default: held-out loss only)"
    )
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="FOLDER", help="as for `evaluate`")
    parser.add_argument("--eval-limit", type=_positive, metavar="N", help="the first N examples of each task")
    parser.add_argument("--extra-data", type=Path, metavar="FILE", help="texts in place of MiniPile's (Table S6)")


def add_part_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="score part I (from 0) of N alone, for array jobs; then `tokenseek merge`",
    )


def guarded(run: Callable[[], object]) -> int:
    """Run, and turn a :class:`UserError` into its message and exit status 2, without a traceback."""
    rank = os.environ.get("RANK", "0")
    try:
        result = run()
    except UserError as error:
        # Nearly all errors are met by every process, and one message is enough. If this process ended first, the
        # launcher might end the main one before it has told; an error that the main one does not meet is told here.
        if rank != "0":
            time.sleep(_SECONDS_TO_MAIN_PROCESS)
        print(f"tokenseek: error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    return result if isinstance(result, int) else 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _pair(text: str) -> tuple[float, float]:
    try:
        alpha, beta = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ALPHA,BETA, such as 5,5") from None
    return alpha, beta


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = (int(number) for number in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/8") from None
    if not 0 <= part < parts:
        raise argparse.ArgumentTypeError(f"{text!r}: parts of {parts} are numbered 0 to {parts - 1}")
    return part, parts


def _launch(args: argparse.Namespace) -> int:
    load_config(args.preset, args.set)  # tell of mistakes before any process is started
    words = ["--preset", args.preset] if args.preset else []
    for override in args.set:
        words += ["--set", override]
    if getattr(args, "part", None):
        words += ["--part", "{}/{}".format(*args.part)]
    return _launch_script(args, words)


def _launch_sweep(args: argparse.Namespace) -> int:
    """The same command in every process of a launch."""
    if args.command == "tune":
        load_config(args.preset, args.set)  # tell of mistakes before any process is started
    else:
        table, rows, config = reproduction(args)
        if args.list:
            print("\n".join(f"{row.name}: {row.label}: {row_settings(row, config)}" for row in rows))
            return 0
        table.require_measurable(rows, config, args.seeds, args.tasks)
    options = argparse.ArgumentParser(add_help=False)
    _add_launch_arguments(options)
    return _launch_script(args, options.parse_known_args(args.words)[1])


def tune_grid(args: argparse.Namespace) -> Grid:
    """What the arguments of `tune` ask for."""
    from tokenseek.sweeps.tune import PAPER_WEIGHTS, Grid  # late: needs torch

    return Grid(
        weights=args.weights or PAPER_WEIGHTS,
        ratios=_ratios(args.ratios) if args.ratios else (),
        seeds=args.seeds,
        steps=args.steps,
        hold_out=args.hold_out,
        tolerance=args.tolerance,
    )


def reproduction(args: argparse.Namespace) -> tuple[PaperTable, list[TableRow], RunConfig]:
    """The table, its rows and the configuration that the arguments of `reproduce` ask for."""
    table = load_table(args.table)
    config = table_config(table, args.preset, args.set, paper=args.paper, limit=args.limit)
    if args.tasks:
        runnable_tasks(args.tasks, args.data, config.eval_data, allow_code_execution=False)
    return table, table.choose(args.rows), config


def _evaluate(args: argparse.Namespace) -> int:
    # Tell of mistakes before any process is started.
    runnable_tasks(args.tasks, args.data, _subject(args).held_out, args.allow_code_execution)
    words = [args.model, "--tasks", args.tasks, "--batch-size", str(args.batch_size), "--seed", str(args.seed)]
    for option in ("adapter", "limit", "json", "samples"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", str(value)]
    for option in ("set", "data"):
        for value in getattr(args, option):
            words += [f"--{option}", str(value)]
    if args.allow_code_execution:
        words.append("--allow-code-execution")
    return _launch_script(args, words)


def _subject(args: argparse.Namespace) -> Subject:
    return find_subject(args.model, args.adapter, args.set)


def _launch_script(args: argparse.Namespace, words: list[str]) -> int:
    """Launch the script of a command with these words, on the processes that its arguments ask for."""
    command = ["--config_file", str(resolve_accelerate_config(args.accelerate_config))]
    if args.num_processes:
        command += ["--num_processes", str(args.num_processes)]
    return _accelerate_launch([*command, str(find_resource("launch script", args.command)), *words])


def _accelerate_launch(command: list[str]) -> int:
    """`accelerate launch` in this process, which keeps the exit status of the launched ones; the command loses it."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(command))
    except subprocess.CalledProcessError as error:  # of a single process
        statuses = [error.returncode]
    except ChildFailedError as error:
        statuses = [failure.exitcode for failure in error.failures.values()]
    else:
        return 0
    if USAGE_ERROR in statuses:
        return USAGE_ERROR  # the others were ended for it
    if killed := [-status for status in statuses if status < 0]:
        print(f"tokenseek: error: a process was ended by signal {killed[0]} ({_signal(killed[0])}).", file=sys.stderr)
        return 128 + killed[0]
    return statuses[0]


def _signal(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name}; out of memory?" if number == signal.SIGKILL else name


def _merge(args: argparse.Namespace) -> None:
    from tokenseek.runs.score import merge

    path = load_config(args.preset, args.set).index_path
    header = merge(path)
    print(f"{path}: {header.num_examples:,} examples, {header.num_tokens:,} tokens")


def _plan(args: argparse.Namespace) -> int:
    config = load_config(args.preset, args.set)
    from tokenseek.planning import (  # late: a mistake in the configuration is told before torch is imported
        Method,
        describe_choice,
        find_gpu,
        largest_ratio,
        method_of,
        plan_memory,
        plan_table,
        read_engine,
        time_table,
    )

    budget = args.budget and parse_size(args.budget)
    gpu = args.gpu and find_gpu(args.gpu)
    engines = [read_engine(name, args.num_processes) for name in args.accelerate_config or ["single"]]
    plans, status = [], 0
    for engine in engines:
        print(
            f"{engine}; {config.training.per_device_train_batch_size} x {args.tokens or config.data.max_length} tokens"
        )
        if budget:
            choice = largest_ratio(config, budget, engine, tokens=args.tokens)
            print(describe_choice(choice, budget))
            found = [choice.plan]
            status = max(status, int(choice.ratio is None))
        else:
            methods = [Method(), Method(recompute=True), *(method_of(config, ratio) for ratio in _ratios(args.ratios))]
            found = [plan_memory(config, method, engine, tokens=args.tokens) for method in methods]
        print(plan_table(found), end="\n\n")
        if gpu:
            print(time_table(found, args.gpu, gpu), end="\n\n")
        plans += found
    if args.json:
        args.json.write_text(json.dumps([plan.as_dict(gpu) for plan in plans], indent=1) + "\n", encoding="utf-8")
    return status


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(ratio) for ratio in text.split(",")]
    except ValueError:
        ratios = [0.0]
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise UserError(f"--ratios {text}: accepted are shares in (0, 1] with commas between, such as 0.1,0.5.")
    return ratios


def _show(args: argparse.Namespace) -> None:
    if args.run_folder and not args.figures:
        raise UserError("--run compares training runs in figures: give --figures FOLDER too.")
    if args.run_folder and not args.preset and not args.set:  # figures of the runs alone
        from tokenseek.runs.show import show_runs

        show_runs(args.run_folder, args.figures)
        return
    config = load_config(args.preset, args.set)
    from tokenseek.runs.show import show, show_runs  # late: mistakes are told before torch is imported

    color = sys.stdout.isatty() and not args.no_color
    show(config, args.row or [], args.random, html=args.html, figures=args.figures, color=color)
    if args.run_folder:
        show_runs(args.run_folder, args.figures)


def _merge_adapter(args: argparse.Namespace) -> None:
    from tokenseek.runs.export import merge_adapter

    merge_adapter(args.adapter, args.output, args.dtype, args.base)
    print(f"merged model: {args.output}")


_SWEEP_ARGUMENTS = {"tune": add_tune_arguments, "reproduce": add_reproduce_arguments}


if __name__ == "__main__":
    sys.exit(main())
