"""What a model and its data or adapter must agree on, asked of a skeleton on the meta device: no weight is read."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenseek.config import ModelConfig, PeftSettings
from tokenseek.errors import UserError
from tokenseek.models.adapters import add_adapter
from tokenseek.models.portable import require_portable

if TYPE_CHECKING:
    from peft import PeftModel

# Tables of learned positions may have a few rows more than positions (OPT counts from 2, for one).
_MORE_ROWS = 8
# Numbers that Transformers turns into bfloat16 while it loads them.
_LOADED_WHOLE = ("mxfp4", "fp8")


def learned_positions(skeleton: PreTrainedModel) -> int | None:
    """The longest text of a model that looks its positions up in a table; None where they are computed."""
    positions = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    tokens = skeleton.get_input_embeddings()
    tables = [
        module
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and _names_positions(name)
    ]
    if any(positions <= table.num_embeddings <= positions + _MORE_ROWS for table in tables):
        return positions
    return None


def _names_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "pos" in last or last == "wpe"


def require_fitting_data(
    skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, section: str = "data"
) -> None:
    """Refuse examples that the model cannot take in.

    Args:
        dataset: prepared examples, with `input_ids`.
        section: `data` or `eval_data`, for the dotted path in errors.

    Raises:
        UserError: a text is longer than the positions that the model has learned, or holds a token (or is padded with
            one) that the model has no embedding of.
    """
    ids = dataset.data.column("input_ids")
    longest, positions = pc.max(pc.list_value_length(ids)).as_py(), learned_positions(skeleton)
    if positions is not None and longest > positions:
        raise UserError(
            f"{section}.max_length: the longest example has {longest:,} tokens, and {type(skeleton).__name__} has "
            f"learned {positions:,} positions. Set {section}.max_length={positions} or less, or take a model with "
            "rotary positions."
        )
    rows = skeleton.get_input_embeddings().num_embeddings
    highest = max(pc.max(pc.list_flatten(ids)).as_py(), tokenizer.pad_token_id or 0)
    if highest >= rows:
        raise UserError(
            f"model.name_or_path: {section} has the token {tokenizer.convert_ids_to_tokens(highest)!r} with the id "
            f"{highest:,}, and the model has embeddings of {rows:,} tokens, but the tokenizer has {len(tokenizer):,}. "
            "After tokens are added, call model.resize_token_embeddings(len(tokenizer)) and save both again."
        )


def require_unquantized(skeleton: PreTrainedModel, settings: ModelConfig) -> None:
    """Refuse a model whose files hold quantised weights, which PEFT and this package's layers do not know.

    Raises:
        UserError: names how they are quantised, and what to take.
    """
    stored = getattr(skeleton.config, "quantization_config", None)
    method = getattr(stored, "quant_method", None) or (stored.get("quant_method") if isinstance(stored, dict) else None)
    name = str(getattr(method, "value", method)).lower()
    if stored is not None and name not in _LOADED_WHOLE:
        raise UserError(
            f"model.name_or_path: {settings.name_or_path} holds weights that are quantised already ({name}, by the "
            "quantization_config of its config.json), which cannot be trained here. Take the model that it was made "
            "of; model.quantization=nf4 (--method qlora) quantises it as it is loaded."
        )


def require_adapter(skeleton: PreTrainedModel, settings: PeftSettings) -> PeftModel:
    """Refuse an adapter that does not fit the model's modules, or that is another model after it is loaded again.

    Returns:
        A copy of the skeleton with the adapter, without weights.

    Raises:
        UserError: as :func:`tokenseek.models.adapters.add_adapter` and
            :func:`tokenseek.models.portable.require_portable`.
    """
    # Starts that are computed from the weights have none here; whether PEFT knows them is asked when it is built.
    extra = {key: value for key, value in settings.extra.items() if not key.startswith("init_")}
    adapted = add_adapter(copy.deepcopy(skeleton), settings.model_copy(update={"extra": extra}), without_weights=True)
    require_portable(adapted, settings)
    return adapted
