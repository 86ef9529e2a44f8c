"""`tokenseek plan`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenseek.commands.arguments import add_config_arguments, add_one_line_arguments, positive, split_ratios
from tokenseek.config import OneLine, RunConfig, load_config, load_one_line
from tokenseek.config.resources import list_resources
from tokenseek.config.sizes import parse_size
from tokenseek.errors import UserError

if TYPE_CHECKING:
    from tokenseek.launching.engine import Engine
    from tokenseek.planning import MemoryPlan

HELP = "report the peak memory and the time of a run's steps, without its weights, its data or a GPU"
DESCRIPTION = (
    "tell the peak memory per device of a training step, and estimate its time, from its code run on tensors "
    "without data"
)
LAUNCHED = False
PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_one_line_arguments(parser)
    configured = add_config_arguments(parser)
    configured.add_argument(
        "--shape", metavar="NAME", help="plan this model by its public dimensions, without a hub: llama-3.1-8b, ..."
    )
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--accelerate-config",
        action="append",
        metavar="NAME|PATH",
        help=f"may be given again (default: single); shipped: {', '.join(list_resources('accelerate config'))}",
    )
    group.add_argument("--num-processes", type=positive, metavar="N", help="override the configs' number of processes")
    group = parser.add_argument_group("what is planned")
    group.add_argument("--ratios", default="0.1,0.3,0.5", metavar="R,R", help="shares of the tokens to compare")
    group.add_argument("--tokens", type=positive, metavar="T", help="length of an example (default: data.max_length)")
    group.add_argument("--budget", metavar="SIZE", help="find the largest share, and the fastest settings, that fit")
    group.add_argument(
        "--longest",
        action="store_true",
        help="find the longest example for each method in --budget (7GiB,23GiB: several), or in the "
        "memory of --gpu less 1 GiB",
    )
    group.add_argument(
        "--processes",
        type=positive,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="with --longest: that search side by side (default: one for each CPU, at most 4)",
    )
    group.add_argument("--gpu", metavar="NAME", help="estimate seconds on a GPU too: H100, A100-80, L40S, RTX4090, ...")
    group.add_argument(
        "--launch-us",
        type=_microseconds,
        metavar="US",
        help="the host's microseconds for launching an operation on that GPU (default: 7.5)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the plans to this file, in bytes")
    group.add_argument("--html", type=Path, metavar="FILE", help="write an interactive page of the plans")
    group.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw memory against the share of tokens (with --longest: against length) and over the time of a step",
    )


def _microseconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of microseconds")
    return number


def check(args: argparse.Namespace) -> RunConfig:
    """The configuration, of a preset, of a shape or of the words of `tokenseek train`; it needs no data.

    Raises:
        UserError: no model, an unknown shape, a budget or picture that is not accepted, or flags that exclude each
            other.
    """
    config = _configuration(args)
    if args.plot and args.plot.suffix not in PICTURES:
        raise UserError(f"--plot {args.plot}: a picture's name ends with {' or '.join(PICTURES)}.")
    if args.longest:
        _check_longest(args, config)
    elif args.budget:
        parse_size(args.budget)
        _require_share(config)
    split_ratios(args.ratios)
    return config


def _require_share(config: RunConfig) -> None:
    """Refuse to fit a share into a budget where the rule takes none."""
    if config.training.ditching and not config.selection.takes_ratio:
        raise UserError(
            f"--budget fits the share r of the tokens, and selection.rule: {config.selection.rule} takes none. Plan "
            "without it: --ratios R, with the share of the tokens that the rule selects (of those with a loss, "
            "`tokenseek data` prints it), tells the memory."
        )


def _check_longest(args: argparse.Namespace, config: RunConfig) -> None:
    if not (args.budget or args.gpu):
        raise UserError("--longest needs a size of memory: --budget 23GiB, or --gpu RTX4090.")
    if args.tokens:
        raise UserError(f"--longest finds a length and --tokens {args.tokens} gives one: leave one of them out.")
    if config.training.packing:
        raise UserError(
            f"--longest with training.packing={config.training.packing}, which lays several examples in one row: add "
            "--set training.packing=false."
        )
    for size in (args.budget or "").split(","):
        if size:
            parse_size(size)


def _configuration(args: argparse.Namespace) -> RunConfig:
    if args.shape and args.model:
        raise UserError(f"--shape {args.shape} and --model {args.model}: give one of them.")
    model = args.model
    settings = list(args.set)
    if args.shape:
        from tokenseek.planning import find_shape  # late: it imports torch

        model = find_shape(args.shape).name
    if args.model or args.data or args.method:
        words = OneLine(model, args.data, args.method)
        return load_one_line(words, args.preset, settings, on_cpu=lambda: _on_cpu(args), planned_length=_positions)
    if model:
        settings.append(f"model.name_or_path={model}")
    if args.preset:
        return load_config(args.preset, settings)
    if not any(setting.startswith("model") for setting in settings):
        raise UserError(
            "a plan needs a model: --model (a folder, or a name on the hub), --shape llama-3.1-8b, or a --preset. Data "
            "are not needed; --tokens is the length of an example."
        )
    nowhere = [] if any(setting.startswith("data.sources") for setting in settings) else ["data.sources.0.path=none"]
    return load_config(None, [*nowhere, "output_dir=none", *settings])


def _on_cpu(args: argparse.Namespace) -> bool:
    """Whether the processes that are planned train on CPUs; this machine need not be the one that trains."""
    from tokenseek.launching.engine import read_engine

    return all(read_engine(name, args.num_processes).on_cpu for name in args.accelerate_config or ["single"])


def _positions(config: RunConfig) -> int | None:
    """The longest text that the model was trained for, in tokens."""
    from tokenseek.planning import load_model_config  # late: it imports torch

    return getattr(load_model_config(config).get_text_config(), "max_position_embeddings", None)


def run(args: argparse.Namespace, config: RunConfig) -> int:
    """Returns 1 if a budget is too small for any share of the tokens."""
    from tokenseek.planning import (  # late: a mistake in the configuration is reported before torch is imported
        describe_length,
        describe_loading,
        describe_optimizer_peak,
        describe_training,
        find_gpu,
        load_model_config,
        plan_table,
        read_engine,
        time_table,
    )

    if args.longest:
        return _run_longest(args, config)
    budget = args.budget and parse_size(args.budget)
    gpu = args.gpu and find_gpu(args.gpu, args.launch_us)
    engines = [read_engine(name, args.num_processes) for name in args.accelerate_config or ["single"]]
    if note := describe_length(load_model_config(config), args.tokens or config.data.max_length):
        print(note)
    plans, status = [], 0
    for engine in engines:
        rows = f"{config.training.micro_batch} x {args.tokens or config.data.max_length} tokens"
        print(f"{engine}; {rows}; {describe_training(config)}")
        found, fits = _choose(args, config, engine, budget) if budget else (_compare(args, config, engine), True)
        status = max(status, int(not fits))
        print(plan_table(found))
        for note in (describe_optimizer_peak(found, config), describe_loading(found[0])):
            if note:
                print(note)
        print()
        if gpu:
            print(time_table(found, args.gpu, gpu), end="\n\n")
        plans += found
    _write_page(args, config, plans)
    if args.plot:
        from tokenseek.planning.draw import plan_figure

        plan_figure(plans, budget).savefig(args.plot, dpi=150)
        print(f"picture: {args.plot}")
    if args.json:
        args.json.write_text(json.dumps([plan.as_dict(gpu) for plan in plans], indent=1) + "\n", encoding="utf-8")
    return status


def _compare(args: argparse.Namespace, config: RunConfig, engine: Engine) -> list[MemoryPlan]:
    """The plans of every method with an engine."""
    from tokenseek.planning import methods_of_table, plan_memory  # late, as above

    methods = methods_of_table(config, split_ratios(args.ratios))
    return [plan_memory(config, method, engine, tokens=args.tokens) for method in methods]


def _choose(args: argparse.Namespace, config: RunConfig, engine: Engine, budget: int) -> tuple[list[MemoryPlan], bool]:
    """The plan of the largest share that fits into a budget of bytes, and whether any fits; prints what fits."""
    from tokenseek.planning import (  # late, as above
        REFERENCE,
        describe_choice,
        describe_proposals,
        find_gpu,
        largest_ratio,
        proposals,
    )

    choice, name, ratios = largest_ratio(config, budget, engine, tokens=args.tokens), args.gpu or REFERENCE, args.ratios
    print(describe_choice(choice, budget))
    gpu = find_gpu(name, args.launch_us)
    if fitting := proposals(config, budget, gpu, engine, ratios=split_ratios(ratios), tokens=args.tokens):
        print(describe_proposals(fitting, name, gpu))
    return [choice.plan], choice.ratio is not None


def _run_longest(args: argparse.Namespace, config: RunConfig) -> int:
    """Returns 1 if no method fits into the smallest budget."""
    from tokenseek.planning import (
        RESERVE,
        describe_length,
        describe_training,
        find_gpu,
        load_model_config,
        longest_by_method,
        longest_table,
        methods_of_lengths,
        read_engine,
        time_table,
    )

    gpu = args.gpu and find_gpu(args.gpu, args.launch_us)
    budgets = [parse_size(size) for size in args.budget.split(",")] if args.budget else [gpu.memory - RESERVE]
    model_config, found, longest = load_model_config(config), [], 0
    for name in args.accelerate_config or ["single"]:
        engine = read_engine(name, args.num_processes)
        shape = f"{config.training.micro_batch} x tokens of the longest example that fits"
        print(f"{engine}; {shape}; {describe_training(config)}")
        methods = methods_of_lengths(split_ratios(args.ratios)[0])
        searched = longest_by_method(
            config, methods, budgets, engine, model_config=model_config, processes=args.processes
        )
        print(longest_table(searched, budgets), end="\n\n")
        plans = [each.plan for each in searched if each.plan]
        if gpu and plans:
            print(time_table(plans, args.gpu, gpu), end="\n\n")
        found += plans
        curves = {str(each.method): each.known for each in searched}
        longest = max(longest, *(n for each in searched for n in each.tokens))
    _write_page(args, config, found)
    if args.plot and found:
        from tokenseek.planning.draw import length_figure

        length_figure(curves, budgets).savefig(args.plot, dpi=150)
        print(f"picture: {args.plot}")
    if longest and (note := describe_length(model_config, longest)):
        print(note)
    if args.json:
        args.json.write_text(json.dumps([plan.as_dict(gpu) for plan in found], indent=1) + "\n", encoding="utf-8")
    return int(not found)


def _write_page(args: argparse.Namespace, config: RunConfig, plans: list[MemoryPlan]) -> None:
    if args.html and plans:
        from tokenseek.planning import describe_training
        from tokenseek.planning.page import plan_page

        subject = f"{config.model.name_or_path}, {describe_training(config)}"
        args.html.write_text(plan_page(plans, subject), encoding="utf-8")
        print(f"page: {args.html}")
