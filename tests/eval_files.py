"""Small files in the layouts that `tokenseek evaluate --data` reads."""

import json
import random
from pathlib import Path

from helpers import write_jsonl

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hal Ida Jon Kit Lea Max Nell Otto Pia".split()


def write_eval_files(folder: Path) -> Path:
    """Files of every benchmark but ETHICS: 16 questions of most, two subjects of MMLU."""
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {name: draw.randint(2, 99) for name in NAMES}
    for task in ("arc_challenge", "arc_easy"):
        rows = [
            {
                "query": f"Question: How many pears has {name}?",
                "choices": [f"{counts[name] + step} pears" for step in (0, 1, 20, 300)],
                "gold": number % 4,
            }
            for number, name in enumerate(NAMES)
        ]
        # Asks what the first row asks, with other choices.
        write_jsonl(folder / f"{task}.jsonl", [*rows, {**rows[0], "choices": ["one", "two", "three", "four"]}])
    write_jsonl(
        folder / "hellaswag.jsonl",
        [
            {
                "query": f"Cooking: {name} peels pears. the cook",
                "choices": ["cuts them.", "sleeps in a tree.", "is a pear and a knife.", "runs."],
                "gold": number % 4,
            }
            for number, name in enumerate(NAMES)
        ],
    )
    for split, subjects, count in (("dev", ["anatomy", "astronomy"], 5), ("test", ["astronomy", "anatomy"], 4)):
        rows = [
            {"subject": subject, "query": f"{split} {subject} {number}?", "choices": list("wxyz"), "gold": number % 4}
            for subject in subjects
            for number in range(count + (subject == "anatomy" and split == "test"))
        ]
        write_jsonl(folder / f"mmlu_{split}.jsonl", rows)
    truth = [
        {
            "question": f"What does {name} eat?",
            "mc1_targets": {"Pears": 1, "Nothing at all": 0},
            "mc2_targets": {"Pears": 1, "A pear": 1, "Nothing at all": 0, f"{counts[name]} stones": 0},
        }
        for name in NAMES
    ]
    (folder / "truthfulqa_mc.json").write_text(json.dumps(truth), encoding="utf-8")
    write_jsonl(
        folder / "winogrande.jsonl",
        [
            {
                "context_options": [f"{name} gave Zoe a pear because {who}" for who in (name, "Zoe")],
                "continuation": "was hungry.",
                "gold": number % 2,
            }
            for number, name in enumerate(NAMES)
        ],
    )
    write_jsonl(
        folder / "human_eval.jsonl",
        [
            {
                "prompt": f"def add_{number}(x):\n",
                "entry_point": f"add_{number}",
                "canonical_solution": f"    return x + {number}\n",
                "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
            }
            for number in range(4)
        ],
    )
    for split, names in (("train", NAMES[:8]), ("test", NAMES[8:])):
        rows = [
            {"question": f"{name} has {counts[name]} pears and gets 2. How many?", "answer": _solution(counts[name])}
            for name in names
        ]
        write_jsonl(folder / f"gsm8k_{split}.jsonl", rows)
    write_jsonl(
        folder / "translation.jsonl",
        [
            {
                "source": f"{name} hat {counts[name]} Birnen und isst sie gern.",
                "target": f"{name} has {counts[name]} pears and likes to eat them.",
                "source_language": "German",
                "target_language": "English",
            }
            for name in NAMES[:8]
        ],
    )
    return folder


def _solution(count: int) -> str:
    return f"{count} + 2 = <<{count}+2={count + 2}>>{count + 2}\n#### {count + 2}"
