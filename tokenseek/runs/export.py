"""The finished model: its card, and merging an adapter into its base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from tokenseek.config import ModelConfig, RunConfig
from tokenseek.errors import UserError
from tokenseek.models.files import model_folder, revision_of, weight_files
from tokenseek.models.loading import auto_class

if TYPE_CHECKING:
    from peft import PeftModel


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
    base, revision = config.model.name_or_path, revision_of(config.model, model_folder(config.model))
    # The hub takes names of its own alone.
    base_model = f"base_model: {base}\n" if revision else ""
    at_revision = f" at revision `{revision}`" if revision else ""
    (folder / "README.md").write_text(
        f"""---
{base_model}library_name: {"peft" if adapter else "transformers"}
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---
# {folder.parent.name}

This is {kind} `{base}`{at_revision}, trained with TokenSeek on selected tokens: {trained}.
The whole configuration is in `config.yaml` beside this folder.

| | |
| --- | --- |
{table}
""",
        encoding="utf-8",
    )


def merge_adapter(adapter: Path, output: Path, dtype: str | None = None, base: str | None = None) -> None:
    """Merge a PEFT adapter into its base model and save both, in safetensors, with the tokenizer.

    Where the base model shares one weight between embeddings and head, and the adapter changes one of them alone, the
    merged model has two weights (``tie_word_embeddings`` is false).

    Args:
        adapter: folder with ``adapter_config.json``.
        output: folder to write; must not exist or be empty.
        dtype: of the merged weights; that of the base model by default.
        base: base model to merge into, when it is not where the adapter's configuration says.

    Raises:
        UserError: there is no adapter, no base model or one that the adapter does not fit; or the output is in the way.
    """
    from peft import PeftConfig, PeftModel  # late, as in models/loading.py

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter_config.json; give the folder of an adapter, such as RUN/final.")
    _require_room(output)
    settings = PeftConfig.from_pretrained(str(adapter))
    name, revision = (base, None) if base else (settings.base_model_name_or_path, settings.revision)
    if not name:
        raise UserError(f"{adapter} does not name its base model; give it as --base FOLDER_OR_NAME.")
    try:
        folder = model_folder(ModelConfig(name_or_path=name, revision=revision))
        weight_files(folder)
    except UserError as error:
        raise UserError(
            f"--base: the base model {name!r} of {adapter} is not available; give its folder, or its name on the hub, "
            f"as --base. {error}"
        ) from error
    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=getattr(torch, dtype) if dtype else "auto"
    )
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:  # other shapes, other modules
        raise UserError(f"--base: {adapter} does not fit the base model {name!r}: {error}") from error
    merged = _merged(adapted)
    merged.save_pretrained(output)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    AutoTokenizer.from_pretrained(adapter if has_tokenizer else folder).save_pretrained(output)


def _require_room(output: Path) -> None:
    at = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not at.is_dir():
        raise UserError(f"output: {at} is a file, not a folder; give another output folder.")
    if not os.access(at, os.W_OK):
        raise UserError(f"output: {at} cannot be written to; give another output folder.")
    if at == output and any(output.iterdir()):
        raise UserError(f"output: {output} is not empty; give another output folder.")


def _merged(adapted: PeftModel) -> PreTrainedModel:
    """The base model with the adapter in its weights; embeddings and head stay one weight only if they are equal."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    embeddings, head = (
        cast(Any, layer).get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        for layer in (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    )
    tied = head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", ...)
    if tied:  # or what is merged into the one would be in the other too
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    merged = adapted.merge_and_unload(safe_merge=True)
    embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if tied and torch.equal(embeddings.weight, head.weight):
        head.weight = embeddings.weight
    if head is not None:
        one = head.weight is embeddings.weight
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = one
        if not one:
            merged.all_tied_weights_keys = {}
    return merged
