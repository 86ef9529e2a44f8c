"""What is evaluated: the folder of a run, an adapter, or a model. Nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenseek.config import DataConfig, ModelConfig, load_config, load_evaluated
from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean

# Where `tokenseek train` writes runs by default.
RUNS = "runs"
_RUNS_TOLD = 8


@dataclass(frozen=True)
class Subject:
    """A model, an adapter on it, and the data of its held-out loss.

    Attributes:
        run: the folder of the run that made it, if any.
    """

    model: ModelConfig
    adapter: Path | None = None
    held_out: DataConfig | None = None
    run: Path | None = None


def find_subject(name_or_path: str, adapter: Path | None = None, overrides: Sequence[str] = ()) -> Subject:
    """What a user means by the folder of a run (or its `final/`), of an adapter or of a model, or a name on the hub.

    Of a run, model and held-out data are those of its `config.yaml`.

    Args:
        adapter: folder of an adapter to put on a model.
        overrides: `model.*` and `eval_data.*` settings as for :func:`load_config`.

    Raises:
        UserError: there is no such folder, the run has not finished, an adapter is given for an adapter, or the folder
            holds none.
    """
    path = Path(name_or_path).expanduser()
    _require_folder(name_or_path, path)
    of_run = path.name == "final" and (path.parent / "config.yaml").is_file()
    folder = path.parent if of_run else path
    run = folder if (folder / "config.yaml").is_file() else None
    final = run / "final" if run else path
    if run and not final.is_dir():
        raise UserError(f"{run} has no folder final: its training has not finished, see `tokenseek train`")
    is_adapter = _is_adapter(final)
    if adapter and (run or is_adapter):
        kind = "the folder of a run" if run else "an adapter itself"
        raise UserError(f"--adapter {adapter}: {name_or_path} is {kind}; give a model to put the adapter on")
    if adapter:
        require_adapter(adapter)
    if run:
        config = load_config(run / "config.yaml", overrides)
        model = config.model
        if not is_adapter:
            model = model.model_copy(update={"name_or_path": str(final), "revision": None})
        return Subject(model, final if is_adapter else None, config.eval_data, run)
    base, revision = _base_of(path) if is_adapter else (name_or_path, None)
    if revision:
        overrides = [f"model.revision={revision}", *overrides]
    evaluated = load_evaluated(base, overrides)
    return Subject(evaluated.model, path if is_adapter else adapter, evaluated.eval_data)


def _require_folder(given: str, path: Path) -> None:
    """Refuse a folder that is not there where no name on the hub can be meant, which costs a look at the disk alone."""
    if path.exists():
        return
    # A name on the hub is `model` or `owner/model`; `owner` is no folder of runs.
    is_hub_name = given.count("/") < 2 and not given.startswith((".", "/", "~")) and path.parent != Path(RUNS)
    if is_hub_name and (path.parent == Path() or not _runs_in(path.parent)):
        return
    raise UserError(
        f"there is no folder {given}{runs_near(path)}. Give the folder of a run, of an adapter or of a model, or a "
        "model's name on the hub."
    )


def runs_near(folder: Path) -> str:
    """For an error about a folder that is no run: the runs beside it, else those in :data:`RUNS`."""
    names = [str(run) for run in _runs_in(folder.parent) or _runs_in(Path(RUNS))]
    more = f" and {len(names) - _RUNS_TOLD} more" if len(names) > _RUNS_TOLD else ""
    return f"{did_you_mean(folder, names)}; runs here: {', '.join(names[:_RUNS_TOLD]) or 'none'}{more}"


def _runs_in(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob("*/config.yaml"))


def require_adapter(folder: Path) -> None:
    """Raise UserError unless the folder holds an adapter."""
    if not _is_adapter(folder):
        raise UserError(f"adapter {folder}: the folder holds no adapter_config.json; give one such as RUN/final")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _base_of(adapter: Path) -> tuple[str, str | None]:
    """The name of an adapter's base model, and its revision on the hub."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter} does not name its base model; give the model, and this folder with --adapter")
    return base, settings.get("revision")
