"""`tokenseek reproduce --here`: the paper's tables and figures on a small model and the data of this machine.

Rows of all tables are trials of one sweep, so that rows of different tables that are the same run are run once, and
what was stopped is resumed. What is most needed for the paper's claims comes first, the first seed before the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenseek.config import RunConfig, override_config
from tokenseek.config.resources import list_resources
from tokenseek.launching.processes import leave_launch
from tokenseek.planning import method_of, plan_memory
from tokenseek.runs.summary import TrainingSummary
from tokenseek.sweeps.here_data import (
    count_rows,
    data_settings,
    write_problems,
    write_sentences,
    write_texts,
)
from tokenseek.sweeps.paper import NOT_HERE, TRANSLATION, load_table, row_settings, table_config
from tokenseek.sweeps.reproduce import evaluation, training_losses
from tokenseek.sweeps.sweep import Row, Sweep, Trial, append_row, read_rows
from tokenseek.sweeps.tune import short_runs

# Rows that answer the paper's claims, the most needed first, and whether with every seed; all others follow.
FIRST = (
    ("1", ("qlora", "qlora-tokenseek", "qlora-random", "full", "full-tokenseek"), False),
    ("2", ("alpha-1-beta-0", "alpha-0-beta-1", "r-50"), False),
    ("1", ("qlora-random", "qlora-tokenseek"), True),
    ("S14", ("layer-2", "layer-3"), False),
    ("S11", ("random", "top", "bands"), False),
    ("2", ("r-30", "alpha-3-beta-7", "alpha-7-beta-3", "r-40"), False),
    ("Fig3", ("random-50", "random-30", "random-40"), False),
    ("1", ("full-random",), False),
    ("1", ("qlora",), True),
)
PLANNED = (("1", "qwen2.5-0.5b"), ("2", "llama-3.2-1b"), ("1", "llama-3.2-1b"), ("1", "llama-3.2-3b"))
# The paper's texts are of unknown length: usual ones make its averages, the longest its peaks.
LENGTHS = {"average_tokens": 512, "peak_tokens": 2048}
# Weights of 4 bits are slow on a CPU: QLoRA is LoRA on float32 weights here.
_WHOLE_WEIGHTS = {"model.quantization": None, "model.double_quantization": False}


@dataclass(frozen=True)
class HereOptions:
    """How much is run.

    Attributes:
        folders: with GSM8K's files, and with the evaluation sets that `tasks` needs.
        limit: training examples.
        hold_out: problems that decide, from GSM8K's test set.
        tables: names of those to run; all that can be run here where empty.
    """

    folders: Sequence[Path] = ()
    limit: int = 320
    hold_out: int = 48
    seeds: int = 3
    steps: int | None = None
    tasks: str | None = None
    eval_limit: int | None = None
    tables: Sequence[str] = ()

    @property
    def chosen(self) -> Sequence[str]:
        """Names of the tables to run."""
        return self.tables or tables_here()


def tables_here() -> list[str]:
    """Names of the tables and figures that can be run here."""
    return [name for name in list_resources("table") if name not in NOT_HERE]


def here_config(config: RunConfig, options: HereOptions) -> tuple[RunConfig, str]:
    """The configuration that all runs share, with its data written into its folder; and what the data are.

    Raises:
        UserError: there are too few problems.
    """
    folder = _data_folder(config)
    told = write_problems(folder, options.folders, options.limit, options.hold_out)
    if "S6" in options.chosen:
        write_texts(folder, options.limit)
    if TRANSLATION in options.chosen:
        write_sentences(folder, options.limit, options.hold_out)
    settings = {
        "data.sources.0.path": str(folder / "train.jsonl"),
        "eval_data.sources.0.path": str(folder / "heldout.jsonl"),
    }
    return short_runs(override_config(config, settings), options.steps, options.hold_out), told


def here_trials(config: RunConfig, seeds: int, tables: Sequence[str]) -> list[Trial]:
    """Every row of `tables` with every seed, in the order in which they are run."""
    order: dict[tuple[str, str, int], None] = {}
    for table, names, with_every_seed in FIRST:
        for number in range(seeds if with_every_seed else 1):
            order |= {(table, name, number): None for name in names}
    for number in range(seeds):
        order |= {(table, row.name, number): None for table in tables for row in load_table(table).rows}
    return [_trial(config, *place) for place in order if place[0] in tables]


def _data_folder(config: RunConfig) -> Path:
    return Path(config.output_dir) / "data"


def _trial(config: RunConfig, table: str, name: str, seed: int) -> Trial:
    (row,) = (row for row in load_table(table).rows if row.name == name)
    data = data_settings(table, row.extra_data, _data_folder(config))
    # `data` comes behind the row's own source of extra data, in whose place it stands.
    settings = {**row_settings(row, config), **_WHOLE_WEIGHTS, **data, "seed": seed, "selection.seed": seed}
    if row.method == "full":
        settings["training.learning_rate"] = config.training.learning_rate / 10
    return Trial(f"{table}-{name}-seed-{seed}", settings, {"table": table, "row": name, "seed": seed})


def list_here(config: RunConfig, options: HereOptions) -> list[str]:
    """A line for each run, in order."""
    trials = here_trials(config, options.seeds, options.chosen)
    return [f"{trial.name}: {dict(trial.settings)}" for trial in trials]


def run_here(config: RunConfig, options: HereOptions, run: bool = True) -> Path | None:
    """Run what is missing, and write the rows of all tables; every process calls this.

    Args:
        run: False writes the rows that are there.

    Returns:
        The file of the rows and plans, ``here.jsonl``, in a launch's first process.
    """
    number = leave_launch()
    base, told = here_config(config, options)
    scores = evaluation(options.tasks, options.folders, options.eval_limit) if options.tasks else None
    bleu = evaluation("translation", [_data_folder(base)], None)

    def measure(run: RunConfig, summary: TrainingSummary) -> dict[str, Any]:
        translates, sources = run.eval_data != base.eval_data, run.data.sources
        judge = bleu if translates else scores
        size = {
            "examples": count_rows(source.path for source in sources),
            "held_out": count_rows(source.path for source in run.eval_data.sources) if run.eval_data else 0,
            "data": "made-up sentences" if translates else told + " and made-up texts" * (len(sources) > 1),
        }
        return {**(judge(run, summary) if judge else {}), "losses": training_losses(run), **size}

    folder = Path(config.output_dir)
    sweep = Sweep(folder, base, here_trials(base, options.seeds, options.chosen), measure)
    if run:
        sweep.run()
    if number:
        return None
    planned = folder / "plans.jsonl"
    plans = plan_memory_of_paper(planned) if run and "1" in options.chosen else read_rows(planned)
    file = folder / "here.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*_slim(sweep.rows()), *plans]), encoding="utf-8")
    return file


def plan_memory_of_paper(file: Path, planned: Sequence[tuple[str, str]] = PLANNED) -> list[Row]:
    """Memory of Tables 1 and 2 at the sizes of the paper's models; what `file` has is not planned again.

    Args:
        planned: pairs of a table and a model.
    """
    rows = read_rows(file)
    done = {(row["model"], row["row"], row["lengths"]) for row in rows}
    for name, model in planned:
        table = load_table(name)
        base = table_config(table, None, paper=model)
        for row in table.rows:
            if not _is_planned(row.name, row.method):
                continue
            config = override_config(base, row_settings(row, base))
            for lengths, tokens in LENGTHS.items():
                if (model, row.name, lengths) not in done:
                    done.add((model, row.name, lengths))
                    plan = plan_memory(config, method_of(config), tokens=tokens)
                    sizes = {"tokens": tokens, "average": plan.average, "peak": plan.peak}
                    append_row(file, {"model": model, "row": row.name, "lengths": lengths, **sizes})
    return read_rows(file)


def _is_planned(name: str, method: str) -> bool:
    """Random tokens take the memory of sought ones, whatever their weights; 10 % is in Table 1."""
    same = name.endswith("-random") or name.startswith("alpha-") or name == "r-10"
    return method in ("full", "loha", "qlora") and not same


def _slim(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows as they are kept beside the page: without what a run's own folder is needed for."""
    for row in rows:
        yield {name: value for name, value in row.items() if name not in ("before", "key", "trial", "train_loss")}
