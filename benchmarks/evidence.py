"""What each selection rule teaches a real model: held-out loss after equal steps, over rules, ratios and seeds.

    python -m benchmarks.evidence run --model FOLDER --data FOLDER --output FOLDER
    python -m benchmarks.evidence table FOLDER/rows.jsonl ... [--into docs/evidence.md]

`run` may be started any number of times at once, killed, and started again: every finished run is one line of
``rows.jsonl``. A seed decides the order of the data, the initial adapter and the random selections.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from tokenseek.config import RunConfig, load_config
from tokenseek.sweeps.sweep import Row, Sweep, Trial, read_rows
from tokenseek.sweeps.tables import grouped, markdown

# Rule -> (how it is called, its settings but the ratio).
RULES = {
    "full": ("all tokens, no ditching", {"training.ditching": False}),
    "random": ("random", {"selection.rule": "random"}),
    "random-response": ("random among response tokens", {"selection.rule": "random", "selection.scope": "supervised"}),
    "context": ("context (1, 0)", {"selection.alpha": 1, "selection.beta": 0}),
    "gradient": ("gradient (0, 1)", {"selection.alpha": 0, "selection.beta": 1}),
    "mixed": ("mixed (5, 5)", {"selection.alpha": 5, "selection.beta": 5}),
    "sampled": (
        "drawn by gradient among response tokens, weighted",
        {
            "selection.rule": "sampled",
            "selection.alpha": 0,
            "selection.beta": 1,
            "selection.explore": 0.5,
            "selection.scope": "supervised",
        },
    ),
    "mixed-response": ("mixed among response tokens", {"selection.scope": "supervised"}),
    "explore": ("mixed, 30 % of the budget at random", {"selection.rule": "top_random", "selection.explore": 0.3}),
    "bands": ("mixed, half from the top and half from rank 40 % on", {"selection.rule": "bands"}),
}
OPTIONS = ("mixed-response", "explore", "bands")  # at the first ratio alone
MAX_CHARACTERS = 250  # of question and answer


def trials(ratios: list[float], seeds: list[int], rules: Iterable[str] = tuple(RULES)) -> list[Trial]:
    """In an order that makes a table early: all rules at the first ratio, seed by seed, then the other ratios."""
    found = []
    for ratio in ratios:
        for seed in seeds:
            for rule in rules:
                if ratio != ratios[0] and rule in ("full", *OPTIONS):
                    continue
                settings = {**RULES[rule][1], "seed": seed, "selection.seed": seed}
                labels = {"rule": rule, "seed": seed}
                if rule == "full":
                    found.append(Trial(f"full-seed-{seed}", settings, {**labels, "ratio": 1.0}))
                    continue
                settings["selection.ratio"] = ratio
                if rule == "bands":
                    settings["selection.bands"] = [[0, ratio / 2], [0.4, round(0.4 + ratio / 2, 6)]]
                found.append(Trial(f"{rule}-{ratio:g}-seed-{seed}", settings, {**labels, "ratio": ratio}))
    return found


def base_config(args: argparse.Namespace) -> RunConfig:
    args.output.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, count in (("train", args.train), ("test", args.test)):
        lines = (args.data / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        problems = [line for line in lines if sum(map(len, json.loads(line).values())) <= MAX_CHARACTERS]
        files[split] = args.output / f"{split}.jsonl"
        text = "\n".join(problems[:count]) + "\n"
        if not files[split].exists() or files[split].read_text(encoding="utf-8") != text:  # others may be reading it
            files[split].write_text(text, encoding="utf-8")
    columns = "columns={instruction: question, response: answer}"
    return load_config(
        "gsm8k",
        [
            f"model.name_or_path={args.model}",
            f"data.sources.0.path={files['train']}",
            "data.template=plain",
            f"eval_data.sources.0.path={files['test']}",
            f"eval_data.sources.0.{columns}",
            "eval_data.template=plain",
            "eval_data.max_length=512",
            f"training.max_steps={args.steps}",
            "training.per_device_train_batch_size=4",
            "training.per_device_eval_batch_size=8",
            "training.gradient_accumulation_steps=1",
            f"training.learning_rate={args.learning_rate}",
            "training.warmup_steps=2",
            "training.save_strategy=no",
            "training.report_to=[]",
            "training.resume=never",
            "training.extra={disable_tqdm: true}",
            f"output_dir={args.output}",
        ],
    )


def table(rows: list[Row]) -> str:
    """Mean, and least to greatest, over the seeds, beside the share of the gap to full tuning that a rule closes."""
    groups = grouped(rows, "ratio", "rule", "steps")
    order = {rule: number for number, rule in enumerate(RULES)}
    groups.sort(key=lambda g: (g.values[1] != "full", g.values[0], order[g.values[1]], g.values[2]))
    full = next((group.mean("loss_after") for group in groups if group.values[1] == "full"), None)
    lines = []
    for group in groups:
        (ratio, rule, steps), loss, before = group.values, group.mean("loss_after"), group.mean("loss_before")
        gap = "" if full is None else f"{(before - loss) / (before - full):.0%}"
        carrying = f"{group.mean('supervised_share'):.0%}"
        found = [carrying, group.spread("loss_after"), gap, str(len(group.rows))]
        lines.append([RULES[rule][0], f"{ratio:.0%}", str(steps), *found])
    before = f"Held-out loss before training: {rows[0]['loss_before']:.4f} nats per supervised token.\n\n"
    titles = ["rule (alpha, beta)", "r", "steps", "selected with a loss", "held-out loss"]
    return before + markdown([*titles, "of full tuning's gain", "runs"], lines)


def write_into(page: Path, text: str) -> None:
    """Put the table between the two marks of a page."""
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page} has no lines {begin.strip()} and {end}")
    page.write_text(f"{head}{begin}{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    run.add_argument("--data", type=Path, required=True, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--rules", choices=RULES, nargs="+", default=list(RULES))
    run.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--train", type=int, default=80, metavar="N", help="training examples")
    run.add_argument("--test", type=int, default=24, metavar="N", help="held-out examples")
    run.add_argument("--steps", type=int, default=20, help="optimizer steps of 4 examples")
    run.add_argument("--learning-rate", type=float, default=1e-3)
    run.add_argument("--threads", type=int, default=1)
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
    sweep = Sweep(args.output, base_config(args), trials(args.ratios, args.seeds, args.rules))
    print(table(sweep.run(lambda line: print(line, flush=True))))


if __name__ == "__main__":
    main()
