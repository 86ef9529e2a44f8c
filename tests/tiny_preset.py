"""A preset for runs that end in seconds: a tiny model, word problems, two optimizer steps."""

from __future__ import annotations

from pathlib import Path

from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model

from tokenseek.config import RunConfig, load_config
from tokenseek.data.toy import make_word_problems


def tiny_preset(folder: Path, *overrides: str, examples: int = 12) -> RunConfig:
    """The configuration, whose model and data are written into `folder`."""
    if not (folder / "model").exists():
        tokenizer = tiny_tokenizer()
        model = tiny_model("llama_tied", vocab_size=len(tokenizer), max_position_embeddings=512)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        write_jsonl(folder / "train.jsonl", make_word_problems(examples))
    settings = [
        f"model.name_or_path={folder / 'model'}",
        f"data.sources.0.path={folder / 'train.jsonl'}",
        "selection.rule=top",
        "peft.dropout=0.05",
        "training.max_steps=2",
        "training.save_strategy=no",
        "training.report_to=[]",
        "training.extra={disable_tqdm: true}",
        f"output_dir={folder / 'run'}",
    ]
    return load_config("gsm8k", [*settings, *overrides])
