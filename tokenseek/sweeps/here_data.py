"""The data of `tokenseek reproduce --here`: short problems of GSM8K, or made-up ones, and what single tables add.

All files are in one folder, that of the output, in ``data/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenseek.data.toy import make_word_problems
from tokenseek.data.translation import DOMAINS, as_completion, make_sentences
from tokenseek.errors import UserError
from tokenseek.sweeps.paper import PAPER_EXAMPLES, TRANSLATION

GSM8K = {"train": "gsm8k_train.jsonl", "heldout": "gsm8k_test.jsonl"}
MOST_CHARACTERS = 250  # of question and answer
_PAPER_TEXTS = 100_000  # that Table S6 adds
_MOST_TEXTS = 5000  # that can be made up


def write_problems(folder: Path, searched: Sequence[Path], limit: int, hold_out: int) -> str:
    """Write ``train.jsonl`` and ``heldout.jsonl``; what they are, in words.

    Args:
        folder: of the files.
        searched: folders that may have GSM8K's files.

    Raises:
        UserError: there are too few problems.
    """
    counts = {"train": limit, "heldout": hold_out}
    files = {split: _find(searched, name) for split, name in GSM8K.items()}
    if None in files.values():
        told = "made-up word problems"
        problems = make_word_problems(sum(counts.values()))
        chosen = {"train": problems[:limit], "heldout": problems[limit:]}
    else:
        told = f"GSM8K's problems of at most {MOST_CHARACTERS} characters"
        chosen = {
            split: short_problems(path, MOST_CHARACTERS)[: counts[split]] for split, path in files.items() if path
        }
    for split, problems in chosen.items():
        if len(problems) < counts[split]:
            raise UserError(f"{files[split]} has {len(problems)} short problems; give --limit or --hold-out up to that")
        write_rows(folder / f"{split}.jsonl", problems)
    return told


def write_texts(folder: Path, limit: int) -> None:
    """Write ``texts.jsonl``, as many made-up texts beside `limit` examples as Table S6 has beside the paper's.

    Raises:
        UserError: so many cannot be made up.
    """
    count = round(limit * _PAPER_TEXTS / PAPER_EXAMPLES)
    if count > _MOST_TEXTS:
        most = _MOST_TEXTS * PAPER_EXAMPLES // _PAPER_TEXTS
        raise UserError(
            f"--limit {limit}: Table S6 adds {count} texts to so many examples, and {_MOST_TEXTS} can be made up; give "
            f"--limit {most} at most, or name the other tables with --tables"
        )
    problems = make_word_problems(count, seed=1)
    write_rows(folder / "texts.jsonl", [{"text": f"{each['question']} {each['answer']}"} for each in problems])


def write_sentences(folder: Path, limit: int, hold_out: int) -> None:
    """Write a file of sentences for each domain of Table S7, and ``translation.jsonl``, which the harness reads."""
    trained, tested = (max(1, count // len(DOMAINS)) for count in (limit, hold_out))
    asked = []
    for domain in DOMAINS:
        pairs = make_sentences(domain, trained + tested)
        write_rows(folder / f"{domain}.jsonl", [as_completion(*pair) for pair in pairs[:trained]])
        asked += pairs[trained:]
    write_rows(folder / "sentences.jsonl", [as_completion(*pair) for pair in asked])
    languages = {"source_language": "German", "target_language": "English"}
    write_rows(folder / "translation.jsonl", [{"source": de, "target": en, **languages} for de, en in asked])


def data_settings(table: str, extra_data: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    """What a row changes in the data that all share, by dotted path.

    Args:
        table: by its number.
        extra_data: a source that the row adds; here the texts stand for it.
        folder: of the files.
    """
    if table == TRANSLATION:
        files = [str(folder / f"{domain}.jsonl") for domain in DOMAINS]
        return {
            "data.sources": [{"path": file, "kind": "completion"} for file in files],
            "eval_data.sources": [{"path": str(folder / "sentences.jsonl"), "kind": "completion"}],
        }
    if extra_data:
        return {"data.sources.1": {"path": str(folder / "texts.jsonl"), "kind": extra_data["kind"]}}
    return {}


def count_rows(files: Iterable[str | None]) -> int:
    """Of all files together."""
    return sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files if file)


def _find(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def short_problems(path: Path, most_characters: int) -> list[dict[str, str]]:
    """Those of a file of GSM8K whose question and answer have so many characters at most."""
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [problem for problem in problems if len(problem["question"] + problem["answer"]) <= most_characters]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Unless it is there: another process may be reading it."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
