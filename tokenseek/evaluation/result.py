"""What an evaluation found: as JSON, and as rows of the paper's tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenseek.evaluation.benchmarks import BENCHMARKS, HELD_OUT_LOSS, TABLE_1

AVERAGE = "Average"
_LOSS_COLUMN = "Held-out loss"


@dataclass(frozen=True)
class Score:
    """One benchmark's result.

    Attributes:
        value: a share between 0 and 1; BLEU between 0 and 100; a loss in nats per token.
        stderr: the harness's standard error of `value`; None where there is none.
        examples: how many were evaluated.
        shots: solved examples before each question; None of a loss.
        metrics: all that the harness computed, by its own names.
    """

    metric: str
    value: float
    stderr: float | None
    examples: int
    shots: int | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of a model, with what is needed to get them again.

    Attributes:
        scores: by name of the benchmark.
        model: model, adapter and number formats.
        settings: limit, batch size, seed, number of processes, and where the data came from.
        samples: by benchmark, every prompt and answer where they were asked for.
    """

    scores: dict[str, Score]
    model: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    samples: dict[str, list[dict[str, Any]]] | None = None

    def columns(self, stderr: bool = False) -> dict[str, float | None]:
        """Values (or standard errors) by column title, in the numbers of the paper's tables.

        The average is there if all of Table 1 is; ETHICS, which is the paper's MMLU column, may stand for MMLU.
        """
        values = {name: score.stderr if stderr else score.value for name, score in self.scores.items()}
        mmlu = "mmlu" if "mmlu" in values else "ethics"
        of_table = [values.get(mmlu if name == "mmlu" else name) for name in TABLE_1]
        averaged = [value for value in of_table if value is not None]
        columns: dict[str, float | None] = {}
        for name, benchmark in BENCHMARKS.items():
            if name in values:
                value = values[name]
                columns[benchmark.column] = 100 * value if benchmark.percent and value is not None else value
            if name == "ethics" and len(averaged) == len(of_table):  # the last of those that are averaged
                columns[AVERAGE] = 100 * sum(averaged) / len(averaged)
        if HELD_OUT_LOSS in values:
            columns[_LOSS_COLUMN] = values[HELD_OUT_LOSS]
        return columns

    def row(self, label: str | None = None, stderr: bool = False) -> str:
        """One Markdown row in the order of :meth:`columns`."""
        return _row(label or self.model["label"], self.columns(stderr))

    def table(self) -> str:
        """A Markdown table of the scores and of their standard errors."""
        return markdown_table({self.model["label"]: self.columns(), "standard error": self.columns(stderr=True)})

    def save(self, path: Path) -> None:
        """Write everything but the samples as JSON."""
        content = {key: value for key, value in asdict(self).items() if key != "samples"}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def save_samples(self, folder: Path) -> None:
        """Write the prompts and answers of every benchmark as a file of JSON lines."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, samples in (self.samples or {}).items():
            lines = (json.dumps(sample, ensure_ascii=False, default=str) for sample in samples)
            (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def markdown_table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """A Markdown table of several results' columns, by label; a column that a row lacks is left empty."""
    titles = list(dict.fromkeys(title for columns in rows.values() for title in columns))
    lines = [f"| model | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    rows = {label: {title: columns.get(title) for title in titles} for label, columns in rows.items()}
    return "\n".join(lines + [_row(label, columns) for label, columns in rows.items()])


def _row(label: str, columns: Mapping[str, float | None]) -> str:
    forms = {title: ".4f" if title == _LOSS_COLUMN else ".2f" for title in columns}
    cells = ("" if value is None else format(value, forms[title]) for title, value in columns.items())
    return f"| {label} | {' | '.join(cells)} |"
