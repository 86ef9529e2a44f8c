"""Table S7's files from the texts of Aharoni and Goldberg (2020): DOMAIN/train.de, train.en, test.de and test.en.

    python launch/translation.py FOLDER multi-domain

writes ``medical.jsonl``, ``law.jsonl``, ``it.jsonl`` and ``subtitles.jsonl`` to train on, with the prompt of the
harness's task, and ``translation.jsonl`` to evaluate on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenseek.data.translation import DOMAINS, as_completion


def read_pairs(folder: Path, split: str) -> list[tuple[str, str]]:
    """(German, English), line by line."""
    texts = []
    for language in ("de", "en"):
        path = folder / f"{split}.{language}"
        if not path.is_file():
            raise SystemExit(
                f"{path} is missing; expected are {', '.join(DOMAINS)}, each with train and test in de and en"
            )
        texts.append(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    if len(texts[0]) != len(texts[1]):
        raise SystemExit(f"{folder}: {split}.de has {len(texts[0])} lines, {split}.en {len(texts[1])}")
    return list(zip(*texts, strict=True))


def convert(source: Path, output: Path, tests: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    asked = []
    for domain in DOMAINS:
        write_jsonl(output / f"{domain}.jsonl", (as_completion(*pair) for pair in read_pairs(source / domain, "train")))
        pairs = read_pairs(source / domain, "test")
        asked += random.Random(0).sample(pairs, min(tests, len(pairs)))
    languages = {"source_language": "German", "target_language": "English"}
    rows = ({"source": german, "target": english, **languages} for german, english in asked)
    write_jsonl(output / "translation.jsonl", rows)


def write_jsonl(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tests", type=int, default=500, help="sentences of each domain to evaluate on (default: 500)")
    args = parser.parse_args()
    convert(args.source, args.output, args.tests)


if __name__ == "__main__":
    main()
