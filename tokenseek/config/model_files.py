"""What a path holds that is no folder of a model."""

import json
from pathlib import Path

_ADAPTER = "adapter_config.json"


def without_model(path: Path) -> str:
    """For an error about a path without a `config.json`: what it is, and what to give in its place."""
    if path.suffix.lower() == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return (
            f"{path} is in GGUF, which is for running models and not for training them; give the folder or the name on "
            "the hub of the model that it was made of."
        )
    if (adapter := path / _ADAPTER).is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            base = None
        return (
            f"{path} holds an adapter{f' of {base}' if base else ''} and no model. Merge both with `tokenseek "
            f"merge-adapter {path} OUTPUT` and give OUTPUT, or give the model."
        )
    what = "holds no config.json" if path.is_dir() else "is a file"
    return f"{path} {what}; give a folder written by save_pretrained, or a name on the hub."
