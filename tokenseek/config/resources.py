"""Finds presets, accelerate and DeepSpeed configs and launch scripts, in a checkout or in the installed wheel.

The wheel carries the same folders under `tokenseek/_assets`, so a name means the same file in both.
"""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import yaml

from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean

Kind = Literal["preset", "accelerate config", "DeepSpeed config", "launch script", "table"]

_FOLDER_AND_SUFFIX: dict[str, tuple[str, str]] = {
    "preset": ("launch/presets", ".yaml"),
    "accelerate config": ("accelerate_configs", ".yaml"),
    "DeepSpeed config": ("ds_configs", ".json"),
    "launch script": ("launch", ".py"),
    "table": ("launch/tables", ".yaml"),
}


def assets_root() -> Path:
    """The folder of `launch/`, `accelerate_configs/` and `ds_configs/`: `_assets` in the wheel, or the checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "_assets" if (package / "_assets").is_dir() else package.parent


def folder_of(kind: Kind) -> Path:
    """Where the shipped files of a kind lie, in a checkout or in an installed package."""
    return assets_root() / _FOLDER_AND_SUFFIX[kind][0]


def list_resources(kind: Kind) -> list[str]:
    """The names `find_resource` knows. Files in sub-folders are building blocks and not listed."""
    return sorted(path.stem for path in folder_of(kind).glob(f"*{_FOLDER_AND_SUFFIX[kind][1]}"))


def find_resource(kind: Kind, name_or_path: str | Path) -> Path:
    """The file a user means by a name (`ddp`), a file name (`ddp.yaml`) or a path (`accelerate_configs/ddp.yaml`).

    An existing path wins over a shipped name; a path relative to the checkout works from any folder.

    Raises:
        UserError: there is no such file. Lists the names that exist and the nearest one.
    """
    given, folder, suffix = Path(name_or_path), folder_of(kind), _FOLDER_AND_SUFFIX[kind][1]
    candidates = [folder / f"{given}{suffix}", folder / given, assets_root() / given]
    if given.suffix:  # a bare name must not pick up an unrelated file of the working directory
        candidates.insert(0, given)
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    names = list_resources(kind)
    raise UserError(
        f"unknown {kind} {str(name_or_path)!r}{did_you_mean(given.name.removesuffix(suffix), names)}; "
        f"accepted are the path of a {suffix} file and the names {', '.join(names)}"
    )


def resolve_accelerate_config(name_or_path: str | Path) -> Path:
    """An accelerate config that `accelerate launch --config_file` can use from the current working directory.

    accelerate reads a relative `deepspeed_config_file` from the working directory. Where it is not found there, the
    result is a temporary copy (removed at exit) that names the shipped file, or the one beside the config, by its
    absolute path.
    """
    config_path = find_resource("accelerate config", name_or_path)
    config = parse_yaml(config_path.read_text(encoding="utf-8"), str(config_path))
    ds_file = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if ds_file is None or Path(ds_file).is_file():
        return config_path
    beside = config_path.parent / ds_file
    absolute = beside.resolve() if beside.is_file() else find_resource("DeepSpeed config", ds_file)
    config["deepspeed_config"]["deepspeed_config_file"] = str(absolute)
    folder = Path(tempfile.mkdtemp(prefix="tokenseek-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / config_path.name
    copy.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return copy
