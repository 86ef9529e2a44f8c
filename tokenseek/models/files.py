"""The files of a model: where they are, what they are named by, and what they are recognised by."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tokenseek.config import ModelConfig
from tokenseek.config.model_files import without_model
from tokenseek.errors import UserError

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


def name_of(model: ModelConfig, folder: Path) -> str:
    """What others find the model by that :func:`model_folder` found here: its name on the hub, or the whole path."""
    return str(folder.resolve()) if is_local(model) else model.name_or_path


def revision_of(model: ModelConfig, folder: Path) -> str | None:
    """The commit on the hub that a model's files are of; None for a folder."""
    return None if is_local(model) else folder.name  # hub's cache names a snapshot by its commit


def is_local(model: ModelConfig) -> bool:
    """Whether the model is a folder here, and not a name on the hub."""
    return Path(model.name_or_path).expanduser().is_dir()
