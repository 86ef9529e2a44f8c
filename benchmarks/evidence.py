"""What TokenSeek teaches a real model, beside ordinary training, each method at its own best learning rate.

    python -m benchmarks.evidence run --model FOLDER --data FOLDER --output FOLDER --regime short-4 --stage scan
    python -m benchmarks.evidence run --model FOLDER --data FOLDER --output FOLDER --regime short-4 --stage confirm
    python -m benchmarks.evidence seconds --model FOLDER --data FOLDER --output FOLDER --regime short-4   (idle machine)
    python -m benchmarks.evidence run ... --stage longer --steps 35 [--epochs several] --methods online --ratios 0.1
    python -m benchmarks.evidence table FOLDER/*/rows.jsonl FOLDER/*/seconds.jsonl [--into docs/evidence.md]

`run` may be started any number of times at once, killed, and started again: every finished run is one line of
``rows.jsonl``. `scan` runs every method at every learning rate with the first seed; `confirm` runs every method that
has been scanned with the other seeds, at the rate of its least loss. `longer` gives it more steps at that rate, as many
as take the seconds of ordinary training by what `seconds` measures: on new examples, or on those of the other stages
several times. A seed decides the order of the data, the initial adapter, dropout and the random selections. Losses do
not depend on the machine's load; seconds do, and are therefore measured by `seconds` alone, method by method in turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocator import keep_freed_memory
from benchmarks.evidence_methods import METHODS, REGIMES
from benchmarks.one_budget import one_budget
from benchmarks.pages import write_into
from tokenseek.config import RunConfig, load_config
from tokenseek.config.loading import override_config
from tokenseek.sweeps.here_data import short_problems, write_rows
from tokenseek.sweeps.sweep import Row, Sweep, Trial, append_row, read_rows
from tokenseek.sweeps.tables import Group, grouped, markdown

HELD_OUT = 24
SECONDS_RESERVE = 10 * 2**30  # bytes, more than any method takes


def trial(
    regime: str, method: str, ratio: float | None, rate: float, seed: int, steps: int | None = None, epochs: str = "one"
) -> Trial:
    """One run.

    Args:
        ratio: None for a method without one.
        steps: None for those of the regime.
        epochs: in which more `steps` than those see examples, "one" or "several".
    """
    labels: dict[str, Any] = {"regime": regime, "method": method, "ratio": ratio, "rate": rate, "seed": seed}
    settings = {**METHODS[method].settings, "seed": seed, "training.learning_rate": rate}
    if settings.get("training.ditching", True):
        settings["selection.seed"] = seed
    if ratio is not None:
        settings["selection.ratio"] = ratio
    parts = [method, *([f"r{ratio:g}"] if ratio else []), f"{rate:g}"]
    if steps is not None:
        settings["training.max_steps"] = steps
        labels["epochs"] = epochs
        parts.append(f"{steps}-steps-{epochs}-epoch")
    return Trial("-".join([*parts, f"seed-{seed}"]), settings, labels)


def _with_ratios(methods: Iterable[str], ratios: Sequence[float]) -> Iterator[tuple[str, float | None]]:
    for method in methods:
        yield from ((method, ratio) for ratio in (ratios if METHODS[method].takes_ratio else [None]))


def best_rate(rows: Iterable[Row], regime: str, method: str, ratio: float | None) -> float | None:
    """The learning rate of the least held-out loss with the first seed; None where nothing was scanned.

    Where other rates were run with its further seeds too, the least mean decides between these.
    """
    own = [row for row in rows if row["regime"] == regime and _is(row, method, ratio) and "epochs" not in row]
    if not own:
        return None
    losses: dict[float, dict[int, float]] = {}
    for row in own:
        losses.setdefault(row["rate"], {})[row["seed"]] = row["loss_after"]
    first_seed = min(row["seed"] for row in own)
    best = min((of_seed[first_seed], rate) for rate, of_seed in losses.items() if first_seed in of_seed)[1]
    seeds = losses[best].keys()
    compared = [rate for rate, of_seed in losses.items() if seeds <= of_seed.keys()] if len(seeds) > 1 else [best]
    return min(compared, key=lambda rate: statistics.mean(losses[rate][seed] for seed in seeds))


def base_config(args: argparse.Namespace, new_examples: int | None = None, held_out: int = HELD_OUT) -> RunConfig:
    """The configuration that all runs of a regime share; writes its data, the first problems that are short enough.

    Args:
        new_examples: train on so many, where a run that is longer sees each once.
        held_out: problems that decide.

    Raises:
        SystemExit: there are fewer short problems than that takes.
    """
    regime = REGIMES[args.regime]
    train, test = (
        short_problems(args.data / f"gsm8k_{split}.jsonl", regime.max_characters) for split in ("train", "test")
    )
    usual = regime.examples * regime.steps if regime.epochs == 1 else len(train)
    count = new_examples or usual
    if len(train) < count:
        raise SystemExit(
            f"{count} examples are asked for; {len(train)} have at most {regime.max_characters} characters. "
            "Longer runs can see them in --epochs several."
        )
    # Solved problems are drawn for further examples at last, so that the others are the same in longer runs.
    parts = train[: min(usual, count)], test[:HELD_OUT], train[usual:count]
    if regime.solved:
        solved, rng = train[-200:], random.Random(0)  # the last ones are in front of questions only
        parts = tuple([_with_solved(one, rng.sample(solved, regime.solved)) for one in part] for part in parts)
    first, deciding, further = parts
    names = f"train-{new_examples}" if new_examples else "train", "test" if held_out == HELD_OUT else f"test-{held_out}"
    files = {}
    for split, name, problems in zip(("train", "test"), names, (first + further, deciding[:held_out]), strict=True):
        files[split] = args.output / f"{name}.jsonl"
        write_rows(files[split], problems)
    columns = "columns={instruction: question, response: answer}"
    return load_config(
        "gsm8k",
        [
            f"model.name_or_path={args.model}",
            f"data.sources.0.path={files['train']}",
            "data.template=plain",
            f"data.max_length={regime.max_length}",
            f"eval_data.sources.0.path={files['test']}",
            f"eval_data.sources.0.{columns}",
            "eval_data.template=plain",
            f"eval_data.max_length={regime.max_length}",
            f"training.max_steps={regime.steps}",
            f"training.per_device_train_batch_size={regime.micro_batch}",
            "training.per_device_eval_batch_size=8",
            f"training.gradient_accumulation_steps={regime.examples // regime.micro_batch}",
            "peft.dropout=0.05" if regime.adapter else "peft=null",
            "training.warmup_steps=2",
            "training.save_strategy=no",
            "training.report_to=[]",
            "training.resume=never",
            "training.extra={disable_tqdm: true}",
            f"output_dir={args.output}",
        ],
    )


def _with_solved(problem: dict[str, str], solved: list[dict[str, str]]) -> dict[str, str]:
    shots = "".join(f"{shot['question']}\n{shot['answer']}\n\n" for shot in solved)
    return {**problem, "question": shots + problem["question"]}


def planned(args: argparse.Namespace, rows: list[Row]) -> list[Trial]:
    """The runs of a stage."""
    found, regime = [], REGIMES[args.regime]
    for method, ratio in _with_ratios(args.methods, args.ratios):
        same = METHODS[method].steps_of
        if same and args.stage != "longer":
            continue
        if args.stage == "scan":
            found += [trial(args.regime, method, ratio, rate, args.seeds[0]) for rate in args.rates or regime.rates]
            continue
        best = best_rate(rows, args.regime, same or method, ratio)
        more = (args.steps, args.epochs) if args.stage == "longer" else ()
        for rate in args.rates or ([] if best is None else [best]):
            found += [trial(args.regime, method, ratio, rate, seed, *more) for seed in args.seeds]
    return found


def run_stage(args: argparse.Namespace, base: RunConfig) -> None:
    """Run what `args` plan, telling each run's loss."""
    # No setting tells runs with one budget for a batch from those with one for each example: they have a folder.
    folders = {False: args.output, True: args.output / "of-batch"}
    trials = planned(args, [row for folder in folders.values() for row in read_rows(folder / "rows.jsonl")])
    for of_batch, folder in folders.items():
        own = [one for one in trials if METHODS[one.labels["method"]].of_batch == of_batch]
        with one_budget(of_batch):
            Sweep(folder, base, own).run(lambda line: print(line, flush=True))


def measure_seconds(args: argparse.Namespace) -> None:
    """Seconds of a step of every method, in turns, `args.repeats` times; rows are added to ``seconds.jsonl``.

    Those that it has are kept. Scoring for an index, of the examples of the regime, is counted apart from the steps.
    """
    base, regime = base_config(args, held_out=1), REGIMES[args.regime]  # what is learned is of no interest
    rows = args.micro_batch or regime.micro_batch
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": regime.examples // rows}
    base = override_config(base, {f"training.{name}": value for name, value in settings.items()})
    told = ("method", "ratio", "repeat", "micro_batch")
    known = {tuple(row.get(name) for name in told) for row in read_rows(args.output / "seconds.jsonl")}
    for repeat in range(args.repeats):
        for method, ratio in _with_ratios(args.methods, args.ratios):
            if (method, ratio, repeat, args.micro_batch) in known:
                continue
            folder = args.output / "seconds" / f"{repeat}-{rows}{'-of-batch' * METHODS[method].of_batch}"
            one = trial(args.regime, method, ratio, 1e-3, 0, args.steps)
            with one_budget(METHODS[method].of_batch):
                (row,) = Sweep(folder, base, [one]).run(lambda line: None)
            labels = {name: row[name] for name in ("regime", "method", "ratio")}
            measured = {"seconds_a_step": row["seconds"] / args.steps, "peak": row["step_peak_bytes"]}
            if "scoring_seconds" in row:
                measured["scoring_seconds"] = row["scoring_seconds"]
            labels |= {"repeat": repeat, "threads": args.threads}
            labels |= {"micro_batch": rows} if args.micro_batch else {}
            append_row(args.output / "seconds.jsonl", {**labels, **measured})
            print(f"{one.name}: {measured['seconds_a_step']:.2f} s a step", flush=True)


def table(rows: list[Row]) -> str:
    """Tables for each regime: every method at its best rate, beside the rates that were tried; and at equal seconds.

    Args:
        rows: of runs and of measured seconds.
    """
    parts = []
    for regime in [name for name in REGIMES if any(row["regime"] == name for row in rows)]:
        own = [row for row in rows if row["regime"] == regime]
        measured = [row for row in own if "seconds_a_step" in row and "micro_batch" not in row]
        runs = [row for row in own if "loss_after" in row]
        steps = [row for row in runs if "epochs" not in row]
        if {row["method"] for row in steps} != {"ordinary"}:
            parts.append(_at_equal_steps(regime, steps))
        for epochs in ("one", "several"):
            longer = [row for row in runs if row.get("epochs") == epochs]
            if longer and measured:
                parts.append(_at_equal_seconds(regime, epochs, steps, longer, measured))
    return "\n\n".join(parts)


def _at_equal_steps(regime: str, rows: list[Row]) -> str:
    before = rows[0]["loss_before"]
    ordinary = _at_best(rows, regime, "ordinary", None)
    lines = []
    for method, ratio in _with_ratios(METHODS, sorted({row["ratio"] for row in rows} - {None})):
        group = _at_best(rows, regime, method, ratio)
        if group is None:
            continue
        gain = "" if ordinary is None else _share(before, group, ordinary)
        scanned = sorted({(r["rate"], r["loss_after"]) for r in rows if _is(r, method, ratio) and r["seed"] == 0})
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in scanned)
        share = "" if ratio is None else f"{ratio:g}"
        rate = f"{group.rows[0]['rate']:g}"
        lines.append([METHODS[method].title, share, rate, group.spread("loss_after", 3), gain, tried])
    titles = ["method", "r", "best rate", "held-out loss", "of ordinary training's gain", "rates tried, first seed"]
    epochs = f" in {count} epochs" if (count := REGIMES[regime].epochs) > 1 else ""
    steps = f"{rows[0]['steps']} steps{epochs}"
    head = f"**{REGIMES[regime].title}** ({steps}, from {before:.3f} nats per supervised token)"
    return f"{head}\n\n{markdown(titles, lines)}"


def _at_equal_seconds(regime: str, epochs: str, steps: list[Row], longer: list[Row], measured: list[Row]) -> str:
    """Ordinary training in the regime's steps, and others in about as many seconds.

    Args:
        steps: rows of runs of the regime's own steps.
        longer: of runs of more, in `epochs`.
        measured: of seconds.
    """
    before = steps[0]["loss_before"]
    groups = [group for group in (_at_best(steps, regime, "ordinary", None),) if group]
    groups += grouped(longer, "method", "ratio", "rate", "steps")
    lines = []
    for group in groups:
        method, ratio, rate, count = (group.rows[0][name] for name in ("method", "ratio", "rate", "steps"))
        of_method = [row for row in measured if _is(row, method, ratio)]
        seconds = ""
        if of_method:
            step = statistics.mean(row["seconds_a_step"] for row in of_method)
            scoring = statistics.mean(row.get("scoring_seconds", 0.0) for row in of_method)
            seconds = f"{count * step + scoring:.0f}"
        share = "" if ratio is None else f"{ratio:g}"
        gain = _share(before, group, groups[0])
        lines.append(
            [METHODS[method].title, share, f"{rate:g}", f"{count}", seconds, group.spread("loss_after", 3), gain]
        )
    titles = ["method", "r", "rate", "steps", "seconds", "held-out loss", "of ordinary training's gain"]
    examples = "each example seen once" if epochs == "one" else "the same examples, in several epochs"
    threads = f"{(count := measured[0]['threads'])} thread{'s' * (count > 1)}"
    head = f"**{REGIMES[regime].title}, at equal seconds**, {examples} ({threads}, from {before:.3f} nats per token)"
    return f"{head}\n\n{markdown(titles, lines)}"


def _is(row: Row, method: str, ratio: float | None) -> bool:
    return (row["method"], row["ratio"]) == (method, ratio)


def _at_best(rows: list[Row], regime: str, method: str, ratio: float | None) -> Group | None:
    rate = best_rate(rows, regime, method, ratio)
    own = [row for row in rows if _is(row, method, ratio) and row["rate"] == rate]
    return grouped(own, "method")[0] if own else None


def _share(before: float, group: Group, ordinary: Group) -> str:
    """Of ordinary training's gain, over the seeds that both have."""
    losses, reference = ({row["seed"]: row["loss_after"] for row in g.rows} for g in (group, ordinary))
    seeds = losses.keys() & reference.keys()
    if not seeds:
        return ""
    mean, full = (statistics.mean(of[seed] for seed in seeds) for of in (losses, reference))
    return f"{(before - mean) / (before - full):.1%} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    shared.add_argument("--data", type=Path, required=True, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    shared.add_argument("--output", type=Path, required=True, help="folder of this regime's runs")
    shared.add_argument("--regime", choices=REGIMES, default="short-4")
    shared.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    shared.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3])
    shared.add_argument("--threads", type=int, default=1)
    run = commands.add_parser("run", parents=[shared])
    run.add_argument("--stage", choices=("scan", "confirm", "longer"), required=True)
    run.add_argument(
        "--rates", type=float, nargs="+", help="default: four to scan, and the best of these in the other stages"
    )
    run.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, of which --stage scan takes the first")
    run.add_argument("--steps", type=int, help="of stage longer")
    run.add_argument("--epochs", choices=("one", "several"), default="one", help="of stage longer")
    seconds = commands.add_parser("seconds", parents=[shared])
    seconds.add_argument("--steps", type=int, default=4)
    seconds.add_argument("--repeats", type=int, default=3)
    seconds.add_argument("--micro-batch", type=int, help="rows at once; a step has as many. Default: the regime's")
    show = commands.add_parser("table")
    show.add_argument("rows", type=Path, nargs="+")
    show.add_argument("--into", type=Path, metavar="PAGE", help="write it into a page, between its marks")
    args = parser.parse_args()
    if args.command == "table":
        text = table([row for rows in args.rows for row in read_rows(rows)])
        print(text)
        if args.into:
            write_into(args.into, text)
        return
    torch.set_num_threads(args.threads)
    keep_freed_memory(at_once=SECONDS_RESERVE if args.command == "seconds" else 0)
    if args.command == "seconds":
        measure_seconds(args)
        return
    if (args.steps is None) == (args.stage == "longer"):
        parser.error("--steps goes with --stage longer, which needs it")
    if args.stage == "scan" and len(args.seeds or ()) > 1:
        parser.error("--stage scan takes one of --seeds; --stage confirm takes several, and --rates")
    args.seeds = args.seeds or [0, 1, 2]
    is_new = args.stage == "longer" and args.epochs == "one"
    base = base_config(args, args.steps * REGIMES[args.regime].examples if is_new else None)
    run_stage(args, base)


if __name__ == "__main__":
    main()
