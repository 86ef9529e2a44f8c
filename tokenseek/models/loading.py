"""Models and tokenizers, by their configuration."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from tokenseek.config import ModelConfig, RunConfig
from tokenseek.decoder.find import find_causal_lm, find_decoder, find_layers, keep_4bit_differentiable
from tokenseek.ditching.packing import require_packable
from tokenseek.errors import UserError, first_line
from tokenseek.launching import environment
from tokenseek.launching.processes import whole_models
from tokenseek.models.files import model_folder, name_of, weight_files
from tokenseek.ulysses.heads import require_shareable


def require_decoder(
    model: ModelConfig, *, packing: bool = False, group: dist.ProcessGroup | None = None, ditching: bool = True
) -> PreTrainedModel:
    """Refuse a model that cannot be scored or trained, by its configuration: no weight is read.

    Args:
        group: the sequence-parallel ranks that are to share its texts, if any.
        ditching: it is to be scored, or trained on selected tokens; otherwise any causal language model will do.

    Returns:
        The model on the meta device, for further checks.

    Raises:
        UserError: it is not a causal decoder whose every layer keeps keys and values, or lacks the attention asked for,
            or with `packing` cannot keep attention inside each of several examples in a row, or the ranks of `group`
            cannot share its attention; or files of its weights are missing.
    """
    folder, trust = model_folder(model), {"trust_remote_code": model.trust_remote_code}
    weight_files(folder)
    try:
        config = _read_config(folder, model)
        with whole_models(), torch.device("meta"):
            auto = auto_class(config)
            skeleton = auto.from_config(config, attn_implementation=model.attn_implementation, **trust)
    except (ValueError, OSError, ImportError) as error:
        reason = first_line(error)
        raise UserError(
            f"model.name_or_path: {folder} is no causal language model that Transformers can make with "
            f"model.attn_implementation={model.attn_implementation} and "
            f"model.trust_remote_code={str(model.trust_remote_code).lower()}: {reason}"
        ) from error
    try:
        if not ditching and group is None:
            find_causal_lm(skeleton)
            return skeleton
        decoder = find_decoder(skeleton)
        if packing:
            require_packable(decoder)
        if group is not None:
            require_shareable(decoder, group)
    except UserError as error:
        raise UserError(f"model.name_or_path: {folder}: {error}") from error
    return skeleton


def _read_config(folder: Path, model: ModelConfig) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # a value of another type than it should be may fail anywhere
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.name_or_path: {folder / 'config.json'} has a value that Transformers cannot use: {reason}. Mend "
            "it, or fetch the model again."
        ) from error


def load_tokenizer(model: ModelConfig, *, weights: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token.

    Args:
        weights: download the weights of a model of the hub too, which will be needed later.
    """
    folder = model_folder(model, weights=weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(
            f"model.name_or_path: {folder} holds no tokenizer that Transformers can load; save the model's own with "
            f"tokenizer.save_pretrained({str(folder)!r}). Transformers says: {error}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # what stands at padding is masked and carries no loss
    return tokenizer


def load_model(model: ModelConfig, *, packed_in: torch.dtype = torch.uint8) -> PreTrainedModel:
    """The causal LM in the configured dtype, on this process's accelerator, unless an engine deals its weights out.

    Args:
        packed_in: the dtype whose bits hold 4-bit weights. An engine that splits parameters splits floating ones
            alone, and casts those that are not in the dtype of its mixed precision.

    Raises:
        UserError: the folder has no weights for some of its parameters.
    """
    options: dict[str, Any] = {}
    if model.quantization:
        options["quantization_config"] = _quantization(model, packed_in)
    if torch.accelerator.is_available():
        # ZeRO-3 and FSDP fill in each process's share of the weights themselves.
        if model.quantization or not (is_deepspeed_zero3_enabled() or environment.uses_fsdp()):
            options["device_map"] = {"": torch.accelerator.current_device_index()}
    elif model.quantization:
        options["device_map"] = {"": "cpu"}
    folder = model_folder(model)
    auto = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code))
    # A pair, by `output_loading_info`, of which Transformers' types know nothing.
    # Packed weights are whole until the engine takes the model over: what it deals out itself is never packed.
    with whole_models() if model.quantization else nullcontext():
        both: Any = auto.from_pretrained(
            folder,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    loaded, loading = both
    # Transformers fills them in at random, with a warning.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model.name_or_path: {folder} has no weights for {len(missing)} parameters of {type(loaded).__name__}: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Fetch the model again."
        )
    keep_4bit_differentiable(loaded)
    keep_text_alone(loaded)
    loaded.name_or_path = name_of(model, folder)  # what an adapter calls its base model
    return loaded


def auto_class(config: PreTrainedConfig) -> Any:
    """What makes a model of this configuration: of text, or of text and other modalities with a decoder of text."""
    if (
        type(config) not in AutoModelForCausalLM._model_mapping
        and type(config) in AutoModelForImageTextToText._model_mapping
    ):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def keep_text_alone(model: PreTrainedModel) -> None:
    """Of a model of several modalities, keep what is no part of its text decoder from being trained.

    Text reaches none of it, and engines wait for the gradients of all that is trained.
    """
    if model.config.get_text_config() is model.config:
        return
    body, head = find_layers(find_causal_lm(model))[0], model.get_output_embeddings()
    text = {id(parameter) for part in (body, head) for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in text:
            parameter.requires_grad_(False)


def packing_dtype(config: RunConfig) -> torch.dtype:
    """What 4-bit weights are packed in for a training: bytes, or what the launch's engine can split and never casts.

    FSDP2 and ZeRO-3 cast the parameters that they gather to the dtype of their mixed precision; packed in numbers of
    that dtype, weights keep their bits.
    """
    if not (environment.uses_fsdp() or environment.zero_stage() == 3):
        return torch.uint8
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        config.training.mixed_precision, getattr(torch, config.model.dtype)
    )


def _quantization(model: ModelConfig, packed_in: torch.dtype) -> BitsAndBytesConfig:
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        bnb_4bit_quant_storage=packed_in,
    )
