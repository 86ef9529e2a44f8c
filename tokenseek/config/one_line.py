"""A run described in one line: a model, data, and perhaps a method, an output folder and a share of the tokens.

Nothing heavy is imported here, as in all of this room: mistakes in the words are reported before torch is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenseek.config.loading import change_values, checked_values, merge_values, read_preset, recognised_data
from tokenseek.config.model_files import without_model
from tokenseek.config.resources import folder_of
from tokenseek.config.schema import ModelConfig, RunConfig
from tokenseek.errors import UserError, first_line
from tokenseek.spelling import did_you_mean

DEFAULT_METHOD = "lora"
_MAX_LENGTH = 2048
# As in TRL and Axolotl: all weights take small steps, the few of an adapter larger ones.
_RATE_OF_FULL, _RATE_OF_ADAPTER = 2e-5, 2e-4
# What config.json files call the longest text of a model.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True)
class OneLine:
    """The words of one line; None is what was not said.

    Attributes:
        model: a folder, or a name on the hub.
        data: a file or folder, or a data set of the hub, whose format is recognised.
        method: one of :func:`list_methods`.
        output: the run's folder; left out, `runs/<model>-<data>`.
        ratio: the share of the tokens that is trained.
    """

    model: str | None = None
    data: str | None = None
    method: str | None = None
    output: str | None = None
    ratio: float | None = None

    def __bool__(self) -> bool:
        return self != OneLine()


def list_methods() -> list[str]:
    """The names of the ways to train, which are files of `launch/presets/methods`."""
    return sorted(path.stem for path in (folder_of("preset") / "methods").glob("*.yaml"))


def load_one_line(
    words: OneLine,
    preset: str | Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
    on_cpu: Callable[[], bool] = lambda: True,
    planned_length: Callable[[RunConfig], int | None] | None = None,
) -> RunConfig:
    """The checked configuration that one line asks for.

    Without a preset, settings come from `_base/one-line.yaml`, the method's file, the model and the machine. With one,
    they are the preset's, and the words replace its model, data, method, output folder and ratio. `overrides`
    (`a.b=value`) and `settings` (the same as a mapping) come last.

    Args:
        on_cpu: whether the run trains on CPUs; asked when all else is in order, since the answer may take long.
        planned_length: for a plan, which reads neither data nor weights, so that no data need be given: the longest
            text that the model takes, in tokens. By default its `config.json` tells it.

    Example:
        >>> load_one_line(OneLine("Qwen/Qwen2.5-0.5B", "my.jsonl"), overrides=["training.max_steps=100"])

    Raises:
        UserError: there is no such method, file or model, a word is missing, or as :func:`tokenseek.load_config`.
    """
    is_planned = planned_length is not None
    needed = {"model": "--model (a folder, or a name on the hub)"}
    if not is_planned:
        needed["data"] = "--data (a file, a folder or a data set of the hub)"
    if preset is None and (missing := [f"--{name}" for name in needed if getattr(words, name) is None]):
        raise UserError(
            f"{' and '.join(missing)} is missing: without a preset, a {'plan' if is_planned else 'run'} needs "
            f"{' and '.join(needed.values())}."
        )
    values = read_preset(preset or folder_of("preset") / "_base" / "one-line.yaml")
    if preset is None and words.data is None:
        values = merge_values(values, {"data": {"sources": [{"path": "none"}]}})
    values = _with_words(values, words, method=words.method or (None if preset else DEFAULT_METHOD))
    if preset is None:
        rate = _RATE_OF_FULL if values["peft"] is None else _RATE_OF_ADAPTER
        values = merge_values(values, {"training": {"learning_rate": rate}})
    values = change_values(values, overrides, settings or {})
    origin = "command line" if preset is None else str(preset)
    config = checked_values(RunConfig, {"output_dir": "runs", **values}, origin)
    config.require_trainable()
    if preset is None:
        _require_share(config, values.get("selection") or {})
    if words.data is not None or not is_planned:
        _require_files(config)
    if not is_planned:
        _require_libraries(config)
    config = checked_values(RunConfig, values := {"output_dir": _output_of(config), **values}, origin)
    if preset is not None:
        return config
    positions = planned_length(config) if planned_length else _positions(config.model)
    fitting = {"data": {"max_length": min(_MAX_LENGTH, positions or _MAX_LENGTH)}, **_of_machine(config, on_cpu())}
    if is_planned:  # settled by the memory of the machine that trains; one row is the least
        fitting["training"]["per_device_train_batch_size"] = 1
    else:
        fitting = merge_values(fitting, _planned_at_start(config))
    return checked_values(RunConfig, merge_values(fitting, values), origin)


def _with_words(values: dict[str, Any], words: OneLine, method: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if words.model is not None:
        said["model"] = {"name_or_path": words.model, "revision": None}
    if words.data is not None:
        said["data"] = recognised_data(words.data)
    if words.ratio is not None:
        said["selection"] = {"ratio": words.ratio}
    values = merge_values(values, said)
    if method is not None:
        values = merge_values(values | {"peft": None}, _method(method))
    if words.output is not None:
        values["output_dir"] = words.output
    elif words.model is not None or words.data is not None:
        values.pop("output_dir", None)  # of a run with another model or other data
    return values


def _require_share(config: RunConfig, selection: Mapping[str, Any]) -> None:
    """Refuse a share that was said beside a rule that takes none; `selection` is as it was said."""
    if "ratio" in selection and not config.selection.takes_ratio:
        raise UserError(
            f"selection.rule: {config.selection.rule} takes no ratio, got {selection['ratio']}; leave out --ratio, or "
            "the rule."
        )


def _method(name: str) -> dict[str, Any]:
    methods = list_methods()
    if name not in methods:
        raise UserError(f"--method {name}: accepted are {', '.join(methods)}{did_you_mean(name, methods)}")
    return read_preset(folder_of("preset") / "methods" / f"{name}.yaml")


def _output_of(config: RunConfig) -> str:
    """`runs/<model>-<data>`, from the last parts of their names."""
    source = config.data.sources[0]
    names = (config.model.name_or_path, source.path or source.name or "")
    return f"runs/{'-'.join(map(_last_part, names))}"


def _last_part(name: str) -> str:
    path = Path(name).expanduser()
    if path.exists():
        path = path.resolve()  # "." and ".." have no name of their own
    last = path.name.removesuffix(".gz").rpartition(".")[0] if path.is_file() else path.name
    return re.sub(r"[^\w.-]+", "-", last or path.name)


def _require_files(config: RunConfig) -> None:
    """Refuse data files that are not there."""
    for section, data in (("data", config.data), ("eval_data", config.eval_data)):
        for number, source in enumerate(data.sources if data else ()):
            path = Path(source.path).expanduser() if source.path is not None else None
            if path is not None and not path.exists():
                beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
                raise UserError(
                    f"{section}.sources.{number}.path: there is no file or folder {source.path}"
                    f"{did_you_mean(path.name, beside)}"
                )


def _require_libraries(config: RunConfig) -> None:
    if config.model.quantization and find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization: {config.model.quantization} (as of method qlora) needs bitsandbytes, which is not "
            "installed: pip install bitsandbytes; or take --method lora."
        )


def _positions(model: ModelConfig) -> int | None:
    """How long a text the model's `config.json` says it takes; None where it does not say.

    Raises:
        UserError: the model has no such file.
    """
    path = _config_file(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.name_or_path: {path} is not JSON ({error}); fetch the model again.") from error
    for part in (config.get("text_config") or {}, config):
        for name in _POSITIONS:
            if isinstance(positions := part.get(name), int) and positions > 1:
                return positions
    return None


def _config_file(model: ModelConfig) -> Path:
    name, folder = model.name_or_path, Path(model.name_or_path).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        return folder / "config.json"
    advice = "give a folder written by save_pretrained, or a name on the hub."
    if folder.exists():
        raise UserError(f"model.name_or_path: {without_model(folder)}")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name_or_path: there is no folder {folder}; {advice}")
    from huggingface_hub import hf_hub_download  # late: folders need no hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=model.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"model.name_or_path: {name!r} is no folder here and cannot be fetched from the hub ({reason}). Give an "
            "existing folder; for a gated model accept its terms and run `hf auth login`."
        ) from error


def _planned_at_start(config: RunConfig) -> dict[str, Any]:
    """What the planner fits to the memory of the device: recomputation and, where steps select by it, the share."""
    if not config.training.ditching:
        return {}
    found: dict[str, Any] = {"training": {"recompute": "auto"}}
    if config.scoring.mode == "online" and config.selection.takes_ratio:
        found["selection"] = {"ratio": "auto"}
    return found


def _of_machine(config: RunConfig, on_cpu: bool) -> dict[str, Any]:
    """In which numbers the model is held and trained, and how many rows at once.

    A full fine-tuning keeps float32 weights and computes in bfloat16: steps of 2e-5 would be lost in the 8 bits of a
    bfloat16 weight. Frozen weights lose nothing, and adapters are float32. Rows of a micro batch are padded to the
    longest; a CPU gains nothing from several of them.
    """
    if on_cpu:
        return {
            "model": {"dtype": "float32"},
            "training": {"mixed_precision": "no", "per_device_train_batch_size": 1},
        }
    dtype = "bfloat16" if config.peft else "float32"
    return {
        "model": {"dtype": dtype},
        "training": {"mixed_precision": "bf16", "per_device_train_batch_size": "auto"},
    }
