"""Models, tokenizers and adapters, by their configuration."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
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
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tokenseek.config import ModelConfig, PeftSettings, RunConfig
from tokenseek.config.model_files import without_model
from tokenseek.decoder.find import find_causal_lm, find_decoder, find_layers, keep_4bit_differentiable
from tokenseek.decoder.names import cache_argument
from tokenseek.ditching.packing import require_packable
from tokenseek.errors import UserError
from tokenseek.launching import environment
from tokenseek.launching.processes import whole_models
from tokenseek.ulysses.heads import require_shareable

if TYPE_CHECKING:  # half of all that scoring would import, which needs no adapters
    from peft import PeftModel

# Fields of a config.json that say nothing about what the model computes.
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash")
_SAMPLE_BYTES = 4096
DAMAGED = (struct.error, ValueError, KeyError, EOFError)


_ALL_BUT_WEIGHTS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def model_folder(model: ModelConfig, *, weights: bool = True) -> Path:
    """The local folder with the model's files, downloaded from the hub if it is not a folder already.

    Args:
        weights: download the weights too.
    """
    local = Path(model.name_or_path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"model.name_or_path: {without_model(local)}")
        return local
    if local.is_file():
        raise UserError(f"model.name_or_path: {without_model(local)}")
    if local.is_absolute() or model.name_or_path.startswith((".", "~")) or model.name_or_path.count("/") > 1:
        raise UserError(
            f"model.name_or_path: there is no folder {local}; give an existing folder or a name on the hub."
        )
    try:
        return Path(
            snapshot_download(
                model.name_or_path,
                revision=model.revision,
                allow_patterns=[*(["*.safetensors"] if weights else []), *_ALL_BUT_WEIGHTS],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"model.name_or_path: {model.name_or_path!r} is no folder here and cannot be fetched from the hub "
            f"({error}). Give an existing folder; for a gated model accept its terms and run `hf auth login`; without "
            "network download it first and set HF_HUB_OFFLINE=1."
        ) from error


def fingerprint_model(folder: Path) -> str:
    """Digest of a model's configuration and weights that does not depend on how the weights are split into files.

    Reads the head of every tensor, not all of it: a few megabytes, before any weight is loaded.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for path in weight_files(folder):
        try:
            tensors.update(sample_tensors(path))
        except DAMAGED as error:
            raise UserError(f"{path} is truncated or no safetensors file ({error}); fetch the model again.") from error
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    content = json.dumps([kept, tensors], sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, all of those that its index names.

    Raises:
        UserError: there are none, or some are missing.
    """
    found = sorted(folder.glob("*.safetensors"))
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not an index of weights ({error!r}); fetch the model again.") from error
        if missing := sorted(named - {path.name for path in found}):
            some = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise UserError(
                f"model.name_or_path: {folder} lacks {len(missing)} of the {len(named)} files of weights that "
                f"{index.name} names: {some}. Fetch the model again."
            )
    if not found:
        raise UserError(
            f"{folder} holds no *.safetensors weights. Convert them once: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...)."
        )
    return found


def sample_tensors(path: Path) -> dict[str, list]:
    """Of every tensor in a safetensors file: its type, shape and a checksum of its first bytes.

    Raises:
        one of `DAMAGED`: the file is truncated, or none of safetensors.
    """
    tensors = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size:
            raise EOFError(f"its header should have {length} bytes, the file has {size}")
        for name, entry in json.loads(file.read(length)).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise EOFError(f"tensor {name} ends after the end of the file")
            file.seek(8 + length + start)
            sample = zlib.crc32(file.read(min(end - start, _SAMPLE_BYTES)))
            tensors[name] = [entry["dtype"], entry["shape"], sample]
    return tensors


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
        reason = str(error).strip().split("\n")[0]
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


def name_of(model: ModelConfig, folder: Path) -> str:
    """What others find the model by that :func:`model_folder` found here: its name on the hub, or the whole path."""
    return str(folder.resolve()) if is_local(model) else model.name_or_path


def revision_of(model: ModelConfig, folder: Path) -> str | None:
    """The commit on the hub that a model's files are of; None for a folder."""
    return None if is_local(model) else folder.name  # hub's cache names a snapshot by its commit


def is_local(model: ModelConfig) -> bool:
    return Path(model.name_or_path).expanduser().is_dir()


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


def add_adapter(
    model: PreTrainedModel, settings: PeftSettings, *, revision: str | None = None, without_weights: bool = False
) -> PeftModel:
    """Wrap the model in a new adapter; its base weights are frozen.

    Args:
        revision: of the model on the hub, which the adapter names with it.
        without_weights: make the adapter on the meta device, to see whether it fits.

    Raises:
        UserError: a method or setting that PEFT does not have, or that does not fit the modules of this model.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType, get_peft_model

    method = PeftType(settings.method.upper())
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    known = {field.name for field in fields(config_class)}
    if method not in PEFT_TYPE_TO_TUNER_MAPPING or "target_modules" not in known:
        raise UserError(
            f"peft.method: {settings.method} is not an adapter that can be added to a model's layers; use lora, loha, "
            "lokr, ia3, ..."
        )
    target_modules = _target_modules(model, settings.target_modules)
    options = dict(settings.extra, task_type="CAUSAL_LM", target_modules=target_modules)
    # PEFT's methods name the same three things differently.
    names = {"r": ("r",), "alpha": ("lora_alpha", "alpha"), "dropout": ("lora_dropout", "dropout", "rank_dropout")}
    for setting, candidates in names.items():
        value = getattr(settings, setting)
        if value is not None:
            name = next((candidate for candidate in candidates if candidate in known), None)
            if name is None:
                raise UserError(f"peft.{setting}: {settings.method} has no such setting; leave it out.")
            options[name] = value
    if unknown := set(options) - known:
        raise UserError(f"peft.extra: {settings.method} takes no {sorted(unknown)}; it takes {sorted(known)}.")
    # GPT-2's layers are of this kind, whose weights are transposed; PEFT finds out too, and warns.
    if "fan_in_fan_out" in known and any(isinstance(module, Conv1D) for module in model.modules()):
        options.setdefault("fan_in_fan_out", True)
    if settings.method == "ia3" and "feedforward_modules" not in options:
        options["feedforward_modules"] = _feed_forward_among(model, target_modules)
    try:
        return get_peft_model(model, config_class(**options), revision=revision, low_cpu_mem_usage=without_weights)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"peft: {settings.method} does not fit {type(model).__name__}: {error}") from error


def _feed_forward_among(model: PreTrainedModel, target_modules: str | list[str]) -> list[str]:
    """Those of the target modules that lie outside attention, where IA3 scales what enters and not what leaves."""
    names = _linear_modules(model, attention=False)
    if isinstance(target_modules, str):  # all-linear
        return names
    return [target for target in target_modules if any(f".{name}".endswith(f".{target}") for name in names)]


def _target_modules(model: PreTrainedModel, target: str | list[str]) -> str | list[str]:
    groups = {"feed_forward": (False,), "attention": (True,), "all-linear": (False, True)}
    of_text_alone = model.config.get_text_config() is not model.config
    if isinstance(target, list) or (target == "all-linear" and not of_text_alone):
        return target
    names = [name for attention in groups[target] for name in _linear_modules(model, attention)]
    if of_text_alone:  # modules of other modalities may have the same names
        _, layers = find_layers(find_causal_lm(model))
        within = {id(module) for layer in layers for module in layer.modules()}
        names = [
            path
            for path, module in model.named_modules()
            if id(module) in within and any(f".{path}".endswith(f".{name}") for name in names)
        ]
    if not names:
        raise UserError(
            f"peft.target_modules: {target} finds no linear layer in {type(model).__name__} (experts are often one "
            "parameter); name the modules in a list."
        )
    return names


def _linear_modules(model: PreTrainedModel, attention: bool) -> list[str]:
    """Names, within a decoder layer, of the linear modules inside its attention, or in its feed-forward layers.

    Those of a layer's state (a state-space mixer, say) are in neither.
    """
    found = set()
    for layer in find_layers(find_causal_lm(model))[1]:
        mixing = tuple(f"{name}." for name, child in layer.named_children() if cache_argument(child))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                in_attention = "attn" in name or "attention" in name
                if in_attention if attention else not (in_attention or name.startswith(mixing)):
                    found.add(name)
    return sorted(found)
