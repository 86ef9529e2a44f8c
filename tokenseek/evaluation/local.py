"""Local files in place of the hub's data sets.

Rows get the columns of the official data set, and the harness's own task makes prompts, choices and metrics of them:
what is measured is the same with the hub and without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from tokenseek.errors import UserError
from tokenseek.evaluation.benchmarks import Chosen, local_files

Row = dict[str, Any]

# The split of the questions, and that of the solved examples where they come from a file of their own.
QUESTIONS, SHOTS = "test", "train"


def _arc(row: Row) -> Row:
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    return {
        "question": row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _hellaswag(row: Row) -> Row:
    # The official task begins the unfinished last sentence with a capital letter.
    query = re.sub(r"(?<=[.!?] )[a-z](?=[^.!?]*$)", lambda match: match[0].upper(), row["query"])
    return {"query": query, "choices": row["choices"], "label": row["gold"]}


def _mmlu(row: Row) -> Row:
    a, b, c, d = row["choices"]
    return {"question": row["query"], "choices": [a, b, c, d], "answer": row["gold"]}


def _truthfulqa(row: Row) -> Row:
    targets = row["mc2_targets"]
    return {
        "question": row["question"],
        "mc1_targets": {"choices": list(row["mc1_targets"])},
        "mc2_targets": {"choices": list(targets), "labels": list(targets.values())},
    }


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]
    # The official task puts each option at "_" in the sentence. Whole contexts as options give the same two contexts.
    return {"sentence": f"_ {row['continuation']}", "option1": first, "option2": second, "answer": "12"[row["gold"]]}


def _columns(*names: str) -> Callable[[Row], Row]:
    return lambda row: {name: row[name] for name in names}


# benchmark -> (row of the file -> row of the official data set, the column that tells questions apart, task settings)
_LAYOUTS: dict[str, tuple[Callable[[Row], Row], str, Row]] = {
    "arc_challenge": (_arc, "question", {}),
    "arc_easy": (_arc, "question", {}),
    "hellaswag": (_hellaswag, "query", {"process_docs": None}),  # what that would clean is clean in the file
    "mmlu": (_mmlu, "question", {}),
    "truthfulqa": (_truthfulqa, "question", {}),
    "winogrande": (_winogrande, "option1", {}),
    "humaneval": (_columns("prompt", "test", "entry_point"), "prompt", {}),
    "gsm8k": (_columns("question", "answer"), "question", {}),
    "translation": (
        _columns("source", "target", "source_language", "target_language"),
        "source",
        {  # the harness's words, for any pair of languages
            "doc_to_text": "{{source_language}} phrase: {{source}}\n{{target_language}} phrase:",
            "doc_to_target": " {{target}}",
        },
    ),
}


def question_column(name: str) -> str:
    """The column by which two rows of a local benchmark are known to ask the same."""
    return _LAYOUTS[name][1]


def local_settings(chosen: Chosen, task: str, folders: Sequence[Path]) -> Row:
    """Settings that make a task of the harness read local files.

    Raises:
        UserError: a file is missing, or a row of it is not of its layout.
    """
    name = chosen.benchmark.name
    questions, shots = local_files(chosen, folders)
    # Of MMLU, one task of the harness is one subject of the file.
    subject = task.removeprefix("mmlu_") if name == "mmlu" else None
    splits = {QUESTIONS: _dataset(name, questions, subject)}
    if shots:
        splits[SHOTS] = _dataset(name, shots, subject)
    return {
        "custom_dataset": lambda **_: splits,
        "dataset_path": str(questions),
        "test_split": QUESTIONS,
        "validation_split": None,
        "training_split": None,
        "fewshot_split": SHOTS if shots else QUESTIONS,
        **_LAYOUTS[name][2],
    }


def local_subjects(chosen: Chosen, folders: Sequence[Path]) -> set[str | None]:
    """The subjects that a local file of MMLU holds."""
    path, _ = local_files(chosen, folders)
    return {row.get("subject") for row in _read(path)}


def _dataset(name: str, path: Path, subject: str | None) -> Dataset:
    convert, rows = _LAYOUTS[name][0], []
    for number, row in enumerate(_read(path), 1):
        if subject is None or row.get("subject") == subject:
            try:
                rows.append(convert(row))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise UserError(
                    f"{path}, row {number}: does not have the layout of {name} that docs/evaluation.md shows "
                    f"({type(error).__name__}: {error})"
                ) from error
    if not rows:
        raise UserError(f"{path} holds no row" + (f" of the subject {subject!r}" if subject else ""))
    return Dataset.from_list(rows)


@cache
def _read(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # `splitlines` splits inside strings
    except ValueError as error:
        raise UserError(f"{path} is no JSON{' lines' * (path.suffix != '.json')} file ({error})") from error
