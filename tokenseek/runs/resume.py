"""Where a run starts: from the beginning, from a checkpoint, or not at all because it is finished.

`fingerprint.json` in a run's folder records what its weights were trained with. A run that is resumed there has to
agree with it, so that the `config.yaml` beside the weights describes all of their training.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenseek.config import RunConfig, save_resolved
from tokenseek.errors import UserError
from tokenseek.models.files import DAMAGED, sample_tensors
from tokenseek.runs.fingerprint import differences, shown
from tokenseek.runs.summary import TrainingSummary
from tokenseek.training.checkpoints import writing

_log = logging.getLogger(__name__)

FINGERPRINT_NAME, CONFIG_NAME, SUMMARY_NAME, METRICS_NAME = (
    "fingerprint.json",
    "config.yaml",
    "summary.json",
    "metrics.jsonl",
)
# What a run writes into its folder, except the index, which records by itself what it belongs to.
_WRITTEN = (FINGERPRINT_NAME, CONFIG_NAME, SUMMARY_NAME, METRICS_NAME, "final", "runs", f"{PREFIX_CHECKPOINT_DIR}-*")
# Settings that a checkpoint can only be loaded with, whichever run resumes from it.
_SHAPES = ("peft", "model", "training.optim")
# Files and folders of optimizers' states: Trainer's, those of FSDP, and DeepSpeed's.
_OPTIMIZER_STATES = ("optimizer*", "global_step*")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        output: the run's folder.
        checkpoint: training resumes from it; None where training starts from the beginning.
        own: whether the checkpoint or finished run is that of the run's own folder.
        known: the fingerprint of the run that is resumed, if its folder has one.
        summary: of a finished run in the folder.
        finished: there is nothing left to train.
    """

    output: Path
    checkpoint: str | None = None
    own: bool = False
    known: Mapping[str, Any] | None = None
    summary: TrainingSummary | None = None
    finished: bool = False

    @property
    def settled_by(self) -> str | None:
        """A folder beside the `config.yaml` that has values in the place of `auto`; None where `auto` is still open."""
        return self.checkpoint or (str(self.output / "final") if self.own else None)


def find_start(resume: str, output: Path) -> Start:
    """Where a run starts, by `training.resume` and the contents of its folder.

    Raises:
        UserError: there is no such checkpoint, or a file of the folder is damaged.
    """
    if resume == "never":
        return Start(output)
    if resume != "auto":
        checkpoint = Path(resume).expanduser()
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            raise UserError(
                f"training.resume: {resume} is no checkpoint (no {TRAINER_STATE_NAME} in it); accepted are 'auto', "
                f"'never' or the path of a checkpoint such as {output}/checkpoint-500."
            )
        _require_whole(checkpoint)
        own = checkpoint.resolve().parent == output.resolve()
        return Start(output, str(checkpoint), own, _read_json(checkpoint.parent / FINGERPRINT_NAME))
    # The state is written last: a checkpoint without it was being written when the run was killed.
    whole = [path.parent for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    summary = _read_summary(output / SUMMARY_NAME)
    if newest is None and summary is None:
        return Start(output)
    if newest is not None:
        _require_whole(newest)
    known = _read_json(output / FINGERPRINT_NAME)
    return Start(output, str(newest) if newest else None, True, known, summary)


def _require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint whose weights are damaged, or that lacks the optimizer's states.

    Raises:
        UserError: names the file, and what can be done.
    """
    ways = f"Remove {checkpoint} to resume from the checkpoint before it, or start over with training.resume=never."
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            sample_tensors(path)
        except DAMAGED as error:
            raise UserError(f"{path} is truncated or no safetensors file ({error}). {ways}") from error
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_STATES):
        raise UserError(
            f"{checkpoint} holds no states of the optimizer, without which training would go on another way than it "
            f"began. {ways}"
        )


def require_same_inputs(start: Start, now: Mapping[str, Any]) -> Start:
    """`start`, if a run of fingerprint `now` may start there, with `finished` set.

    A run is resumed with the settings that it was trained with, but may become longer. From the checkpoint of another
    run, which `training.resume` names, training resumes with other settings, except those of :data:`_SHAPES`.

    Raises:
        UserError: settings differ, or nothing is left to train; names both values and what can be done.
    """
    folder = start.output if start.own else Path(start.checkpoint or start.output).parent
    found = differences(start.known, now) if start.known else {}
    if not start.own:
        found = {name: text for name, text in found.items() if name.startswith(_SHAPES)}
    if found:
        told = "\n".join(f"  {name}: {text}" for name, text in found.items())
        raise UserError(
            f"output_dir: {folder} holds a run that was trained with other settings:\n{told}\n{_ways_on(start)}"
        )
    if not start.own:
        return start
    before = start.known["length"] if start.known else now["length"]
    if before == now["length"]:
        return replace(start, finished=start.summary is not None)
    if start.checkpoint is None:
        raise UserError(
            f"output_dir: the run in {folder} is finished and has kept no checkpoint to resume from with "
            f"{_lengths(before, now['length'])}. {_ways_on(start)}"
        )
    state = json.loads((Path(start.checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    steps, epochs = now["length"]["max_steps"], now["length"]["num_train_epochs"]
    if not (steps > state["global_step"] if steps > 0 else epochs > state["epoch"]):
        raise UserError(
            f"output_dir: the run in {folder} has taken {state['global_step']} steps ({state['epoch']:g} epochs) "
            f"already; no step is left with {_lengths(before, now['length'])}. {_ways_on(start)}"
        )
    return start


def describe_start(start: Start, now: Mapping[str, Any]) -> str | None:
    """What a user is told about where a run starts; None where there is nothing to tell."""
    if start.finished and (summary := start.summary):
        loss = "" if summary.loss_after is None else f", held-out loss {summary.loss_after:.4f} nats per token"
        return (
            f"The run in {start.output} is finished: {summary.steps:,} steps{loss}; its result is in {summary.final}. "
            "Nothing is trained. To train longer, raise training.max_steps or training.num_train_epochs; to start "
            "over, give another output_dir, or training.resume=never."
        )
    if start.checkpoint is None:
        return None
    if start.known is None:
        return (
            f"WARNING: {Path(start.checkpoint).parent} holds no {FINGERPRINT_NAME}, so it is unknown whether "
            f"{start.checkpoint} was trained with these settings."
        )
    if not start.own and (found := differences(start.known, now)):
        return f"WARNING: {start.checkpoint} was trained with other settings: " + "; ".join(
            f"{name}: {text}" for name, text in found.items()
        )
    if start.known["length"] != now["length"]:
        return (
            f"Resuming from {start.checkpoint} with {_lengths(start.known['length'], now['length'])}; the learning "
            "rate follows the schedule of the new length."
        )
    return None


def write_start(start: Start, config: RunConfig, fingerprint: Mapping[str, Any], state: PartialState) -> None:
    """Write into a run's folder what is trained in it; every process calls this.

    Files of an earlier run are moved to `earlier-1`, `earlier-2`, ...: all of them if this run starts over, the result
    alone if this run makes the earlier one longer.
    """
    state.wait_for_everyone()  # all have read what was there
    if state.is_main_process:
        output = start.output
        with writing(output):
            _move_away(_old_files(start, config.training.resume), output)
            save_resolved(config, output / CONFIG_NAME)
            new = output / f".{FINGERPRINT_NAME}"
            new.write_text(json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8")
            os.replace(new, output / FINGERPRINT_NAME)
    state.wait_for_everyone()


def _old_files(start: Start, resume: str) -> list[Path]:
    """Files of an earlier run that this one does not continue."""
    names: Sequence[str]
    if start.own:
        names = (SUMMARY_NAME, "final") if start.summary else ()
    else:  # without a whole checkpoint and without a result there is nothing to keep
        names = _WRITTEN if resume != "auto" or (start.output / "final").exists() else ()
    return [path for name in names for path in sorted(start.output.glob(name))]


def _move_away(files: Sequence[Path], output: Path) -> None:
    if not files:
        return
    number = 1
    while (earlier := output / f"earlier-{number}").exists():
        number += 1
    earlier.mkdir()
    for path in files:
        path.rename(earlier / path.name)
    for name in (CONFIG_NAME, FINGERPRINT_NAME):  # a result keeps the files that describe it
        if (output / name).exists():
            shutil.copy(output / name, earlier / name)
    _log.info("Moved to %s: %s of an earlier run.", earlier, ", ".join(path.name for path in files))


def _lengths(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(f"training.{k}={shown(now[k])} ({shown(before[k])} before)" for k in now if before[k] != now[k])


def _ways_on(start: Start) -> str:
    if not start.own:
        return "Its checkpoint cannot be loaded with these: give those settings, or start over (training.resume=never)."
    return (
        f"Resume with its settings (those of {start.output / CONFIG_NAME}), give another output_dir, or start over "
        f"with --set training.resume=never, which moves what is there to {start.output}/earlier-1."
    )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}), so it is unknown what the run beside it was trained with. Remove it to "
            "resume without that check, or start over with training.resume=never."
        ) from error


def _read_summary(path: Path) -> TrainingSummary | None:
    values = _read_json(path)
    try:
        return None if values is None else TrainingSummary(**values)
    except TypeError as error:
        raise UserError(
            f"{path} was written by another version of TokenSeek ({error}); give another output_dir, or start "
            "over with training.resume=never."
        ) from error
