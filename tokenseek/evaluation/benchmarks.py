"""Which benchmarks there are, with the paper's settings, and the choice of some of them. Nothing heavy is imported."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenseek.config import DataConfig
from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean

HELD_OUT_LOSS = "held_out_loss"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper, as lm-evaluation-harness knows it.

    Attributes:
        column: its title in the paper's tables.
        folder: of its task files, below the harness's `tasks`; None for a file of ours in `tokenseek/evaluation/tasks`.
        tasks: pattern of the harness's task names; the benchmark is their mean, weighted by their examples.
        metric: the harness's `metric,filter` that the paper reports.
        shots: how many solved examples stand before each question.
        file: name of the questions' file in a folder of local data; None where there is no local layout.
        shots_file: name of the file that the solved examples are drawn from. Where it is missing they are drawn from
            the questions themselves, unless `shots_file_required`.
        runs_code: whether programs that the model writes are run.
        percent: whether the metric is a share, which tables show in percent.
    """

    name: str
    column: str
    folder: str | None
    tasks: str
    metric: str
    shots: int = 0
    file: str | None = None
    shots_file: str | None = None
    shots_file_required: bool = False
    runs_code: bool = False
    percent: bool = True


_ALL = [
    Benchmark("arc_challenge", "ARC", "arc", "arc_challenge", "acc_norm,none", 25, "arc_challenge.jsonl"),
    Benchmark("hellaswag", "HellaSwag", "hellaswag", "hellaswag", "acc_norm,none", 10, "hellaswag.jsonl"),
    Benchmark("mmlu", "MMLU", "mmlu/default", "mmlu_.*", "acc,none", 5, "mmlu_test.jsonl", "mmlu_dev.jsonl", True),
    Benchmark("truthfulqa", "TruthfulQA", "truthfulqa", "truthfulqa_mc2", "acc,none", 0, "truthfulqa_mc.json"),
    Benchmark("winogrande", "WinoGrande", "winogrande", "winogrande", "acc,none", 0, "winogrande.jsonl"),
    # "Five MMLU ethics tasks", in the words of the paper's Table 1: its column is this one (see docs/evaluation.md).
    Benchmark(
        "ethics", "ETHICS", "hendrycks_ethics", "ethics_(cm|deontology|justice|utilitarianism|virtue)", "acc,none", 5
    ),
    Benchmark("arc_easy", "ARC-easy", "arc", "arc_easy", "acc_norm,none", 25, "arc_easy.jsonl"),
    Benchmark("humaneval", "HumanEval", None, "humaneval", "pass@1,create_test", 0, "human_eval.jsonl", runs_code=True),
    Benchmark(
        "gsm8k", "GSM8K", "gsm8k", "gsm8k", "exact_match,strict-match", 5, "gsm8k_test.jsonl", "gsm8k_train.jsonl"
    ),
    Benchmark("translation", "BLEU", "translation", "wmt16-de-en", "bleu,none", 0, "translation.jsonl", percent=False),
]
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
TABLE_1 = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa", "winogrande")


@dataclass(frozen=True)
class Chosen:
    """A benchmark to run, with so many solved examples before each question."""

    benchmark: Benchmark
    shots: int


def choose(tasks: Iterable[str]) -> list[Chosen]:
    """Benchmarks by `name` or, to change the paper's number of solved examples, `name:shots`.

    Raises:
        UserError: for a name that there is not, or one given twice.
    """
    chosen: dict[str, Chosen] = {}
    for task in tasks:
        name, colon, shots = task.strip().partition(":")
        if name not in BENCHMARKS:
            names = [*BENCHMARKS, HELD_OUT_LOSS]
            raise UserError(
                f"unknown task {name!r}{did_you_mean(name, names)}; accepted are {', '.join(names)}, each but the last "
                "also as NAME:SHOTS"
            )
        if colon and not re.fullmatch(r"\d{1,3}", shots):
            raise UserError(f"task {task!r}: after the colon comes the number of solved examples, such as {name}:5")
        if name in chosen:
            raise UserError(f"task {name!r} is given twice")
        chosen[name] = Chosen(BENCHMARKS[name], int(shots) if colon else BENCHMARKS[name].shots)
    return list(chosen.values())


def split_tasks(tasks: str | Sequence[str]) -> tuple[list[Chosen], bool]:
    """The benchmarks among `tasks` (a list, or names with commas between), and whether the held-out loss is, too."""
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    if not names:
        raise UserError(f"no task is given; accepted are {', '.join([*BENCHMARKS, HELD_OUT_LOSS])}")
    return choose(name for name in names if name != HELD_OUT_LOSS), HELD_OUT_LOSS in names


def require_harness(need: str) -> None:
    """Raise UserError, which begins with `need`, where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{need}: pip install 'tokenseek[eval]'")


def runnable_tasks(
    tasks: str | Sequence[str], folders: Sequence[Path], held_out: DataConfig | None, allow_code_execution: bool
) -> tuple[list[Chosen], bool]:
    """:func:`split_tasks`, refusing before anything is loaded what cannot be run.

    Raises:
        UserError: for unknown tasks; the harness is not installed; files or held-out data are missing; programs would
            be run without leave.
    """
    chosen, with_loss = split_tasks(tasks)
    if with_loss and held_out is None:
        raise UserError(
            f"{HELD_OUT_LOSS} needs an eval_data section: evaluate a run that has one, or give it with --set "
            "eval_data.sources.0.path=FILE"
        )
    if chosen:
        require_harness("benchmarks need lm-evaluation-harness")
    for item in chosen:
        if item.benchmark.runs_code and not allow_code_execution:
            raise UserError(
                f"{item.benchmark.name} runs programs that the model writes. Where that is safe, in a container "
                "without network and data of value for one, allow it with --allow-code-execution."
            )
        if folders:
            local_files(item, folders)
    return chosen, with_loss


def local_files(chosen: Chosen, folders: Sequence[Path]) -> tuple[Path, Path | None]:
    """The file with a benchmark's questions, and the one with solved examples if it is needed and there.

    Raises:
        UserError: there is no such folder or file, or no local layout of the benchmark.
    """
    benchmark = chosen.benchmark
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--data {folder}: there is no such folder")
    if benchmark.file is None:
        raise UserError(
            f"{benchmark.name} has no layout of local files; evaluate it from the hub, without --data, or leave it out"
        )

    def find(name: str) -> Path | None:
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def require(name: str) -> Path:
        if (path := find(name)) is None:
            raise UserError(
                f"{benchmark.name} needs the file {name}, which is not in {', '.join(map(str, folders))}; add its "
                "folder with --data, or name other --tasks"
            )
        return path

    shots = None
    if chosen.shots and benchmark.shots_file:
        shots = (require if benchmark.shots_file_required else find)(benchmark.shots_file)
    return require(benchmark.file), shots
