"""`tokenseek plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenseek.commands.arguments import add_config_arguments, configuration, positive, split_ratios
from tokenseek.config import RunConfig, load_config
from tokenseek.config.resources import list_resources
from tokenseek.config.sizes import parse_size

HELP = "report the peak memory and the time of a run's steps, without its weights, its data or a GPU"
DESCRIPTION = (
    "tell the peak memory per device of a training step, and estimate its time, from its code run on tensors "
    "without data"
)
LAUNCHED = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument("--budget", metavar="SIZE", help="find the largest share that fits into, say, 8GiB")
    group.add_argument("--gpu", metavar="NAME", help="estimate seconds on a GPU too: H100, A100-80, L40S, RTX4090, ...")
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the plans to this file, in bytes")


def check(args: argparse.Namespace) -> RunConfig:
    config = _shaped(args) if args.shape else configuration(args)
    if args.budget:
        parse_size(args.budget)
    split_ratios(args.ratios)
    return config


def _shaped(args: argparse.Namespace) -> RunConfig:
    """The configuration with the model of `--shape`; without a preset, one of no data."""
    from tokenseek.planning import find_shape  # late: it imports torch

    nowhere = [] if args.preset else ["data.sources.0.path=none", "output_dir=none"]
    return load_config(args.preset, [*nowhere, *args.set, f"model.name_or_path={find_shape(args.shape).name}"])


def run(args: argparse.Namespace, config: RunConfig) -> int:
    """Returns 1 if a budget is too small for any share of the tokens."""
    from tokenseek.planning import (  # late: a mistake in the configuration is reported before torch is imported
        Method,
        describe_choice,
        describe_length,
        find_gpu,
        largest_ratio,
        load_model_config,
        method_of,
        plan_memory,
        plan_table,
        read_engine,
        time_table,
    )

    budget = args.budget and parse_size(args.budget)
    gpu = args.gpu and find_gpu(args.gpu)
    engines = [read_engine(name, args.num_processes) for name in args.accelerate_config or ["single"]]
    ratios = split_ratios(args.ratios)
    if note := describe_length(load_model_config(config), args.tokens or config.data.max_length):
        print(note)
    plans, status = [], 0
    for engine in engines:
        print(f"{engine}; {config.training.micro_batch} x {args.tokens or config.data.max_length} tokens")
        if budget:
            choice = largest_ratio(config, budget, engine, tokens=args.tokens)
            print(describe_choice(choice, budget))
            found = [choice.plan]
            status = max(status, int(choice.ratio is None))
        else:
            methods = [Method(), Method(recompute=True), *(method_of(config, ratio) for ratio in ratios)]
            found = [plan_memory(config, method, engine, tokens=args.tokens) for method in methods]
        print(plan_table(found), end="\n\n")
        if gpu:
            print(time_table(found, args.gpu, gpu), end="\n\n")
        plans += found
    if args.json:
        args.json.write_text(json.dumps([plan.as_dict(gpu) for plan in plans], indent=1) + "\n", encoding="utf-8")
    return status
