"""The finished model: its card, and merging an adapter into its base."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenseek.config import RunConfig
from tokenseek.errors import UserError


def write_model_card(folder: Path, config: RunConfig, facts: dict[str, str]) -> None:
    """Write the model card ``README.md``: how the model was made, in the hub's format.

    Args:
        facts: measured rows of its table, in order.
    """
    selection, adapter = config.selection, config.peft
    if config.training.ditching:
        trained = (
            f"rule `{selection.rule}`, ratio {selection.ratio:g}, alpha {selection.alpha:g}, beta {selection.beta:g}"
        )
    else:
        trained = "all tokens (no ditching)"
    tags = ["tokenseek", *(["peft", adapter.method] if adapter else [])]
    kind = f"a {adapter.method} adapter for" if adapter else "fine-tuned from"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    (folder / "README.md").write_text(
        f"""---
base_model: {config.model.name_or_path}
library_name: {"peft" if adapter else "transformers"}
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---
# {folder.parent.name}

This is {kind} `{config.model.name_or_path}`, trained with TokenSeek on selected tokens: {trained}.
The whole configuration is in `config.yaml` beside this folder.

| | |
| --- | --- |
{table}
""",
        encoding="utf-8",
    )


def merge_adapter(adapter: Path, output: Path, dtype: str | None = None, base: str | None = None) -> None:
    """Merge a PEFT adapter into its base model and save both, in safetensors, with the tokenizer.

    Args:
        adapter: folder with ``adapter_config.json``.
        output: folder to write; must not exist or be empty.
        dtype: of the merged weights; that of the base model by default.
        base: base model to merge into, when it is not where the adapter's configuration says.
    """
    from peft import PeftConfig, PeftModel  # late, as in models.py

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter_config.json; give the folder of an adapter, such as RUN/final.")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; choose another output folder.")
    base = base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype) if dtype else "auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(output)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(output)
