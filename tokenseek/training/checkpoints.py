"""Writing checkpoints, and resuming with another number of processes than wrote them."""

from __future__ import annotations

import errno
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tokenseek.errors import UserError, first_line
from tokenseek.launching.processes import log_once

_log = logging.getLogger(__name__)

# Of DeepSpeed: the file that names the folder of a converted checkpoint, written last, and the setting to load it.
_UNIVERSAL = "latest_universal"
_LOAD_UNIVERSAL = {"checkpoint": {"load_universal": True}}
# How the two ways of saving say that a file could not be written; neither raises an OSError.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed", "unexpected pos ", "file write failed")
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes into a run's folder.

    Raises:
        UserError: the folder cannot be written to, or there is no room.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_os = isinstance(error, OSError) and error.errno in _CANNOT_WRITE
        is_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_CANNOT_WRITE)
        if not (is_os or is_torch or isinstance(error, SafetensorError)):
            raise
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(
            f"output_dir: {folder} cannot be written: {reason}. Make room (training.save_total_limit=1 keeps one "
            "checkpoint) or give another output_dir; the same command continues from the last whole checkpoint."
        ) from error


def fit_checkpoint(checkpoint: Path, arguments: TrainingArguments, state: PartialState) -> None:
    """Let `arguments` load a checkpoint that another number of processes has written.

    DeepSpeed keeps the optimizer's states in as many parts as there were processes. Its "universal" form, one file a
    parameter, serves any number; it is made beside the parts, once. Other engines keep one file for all.

    Raises:
        UserError: a checkpoint of DeepSpeed is loaded without it, or the other way round, or cannot be converted.
    """
    parts = _zero_parts(checkpoint)
    plugin: Any = arguments.deepspeed_plugin
    deepspeed = plugin is not None
    if bool(parts) != deepspeed:
        raise UserError(
            f"{checkpoint} was written {'with' if parts else 'without'} DeepSpeed, and this run continues "
            f"{'with' if deepspeed else 'without'} it; optimizer states are kept in another way. Launch with the kind "
            "of accelerate config that the run began with, or start over with training.resume=never."
        )
    if not deepspeed or len(parts) == state.num_processes:
        return
    done = checkpoint / _UNIVERSAL
    if not done.exists():
        log_once(
            _log,
            state,
            f"{checkpoint} was written by {len(parts)} processes, these are {state.num_processes}: converting it.",
        )
        if state.is_main_process:
            _make_universal(parts[0].parent)
        while not done.exists():  # no collective: this may take longer than they wait
            time.sleep(0.5)
    plugin.hf_ds_config.config |= _LOAD_UNIVERSAL


class Resumed(TrainerCallback):
    """What is left to do once Trainer has loaded a checkpoint.

    Warns where other steps follow than would have. Mends what DeepSpeed's ZeRO-3 makes of universal checkpoints: all
    groups of parameters get the settings of the first (weight decay, which norms and biases have none of), and one
    counter of steps, which each of them then advances.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.before = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Warn where the epochs have another number of steps than when the checkpoint was written."""
        before, now = (round(s.max_steps / s.num_train_epochs) for s in (self.before, state))
        if before != now and args.max_steps <= 0 and state.is_world_process_zero:
            _log.warning(
                f"WARNING: an epoch had {before} steps when the checkpoint was written, and now it has {now}: other "
                "batches follow than in the interrupted run. For the same, keep the data and the product of "
                "per_device_train_batch_size, gradient_accumulation_steps and the number of processes."
            )
        plugin: Any = args.deepspeed_plugin
        if plugin is not None and _LOAD_UNIVERSAL.items() <= plugin.hf_ds_config.config.items():
            folder = self.checkpoint / (self.checkpoint / _UNIVERSAL).read_text().strip()
            saved = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
            for group, own in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                group.update({key: value for key, value in own.items() if key != "params"})
            while hasattr(optimizer, "optimizer"):  # wrapped by accelerate and by DeepSpeed
                optimizer = optimizer.optimizer
            for values in optimizer.state.values():
                if torch.is_tensor(values.get("step")):
                    values["step"] = values["step"].clone()


def _zero_parts(checkpoint: Path) -> list[Path]:
    """One file for each process that took part in writing a checkpoint of ZeRO; none for other engines."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return []
    return sorted((checkpoint / latest.read_text().strip()).glob("*_optim_states.pt"))


def _make_universal(source: Path) -> None:
    target = source.with_name(f"{source.name}_universal")
    if target.exists():  # of a conversion that was interrupted
        shutil.rmtree(target)
    # A process of its own, since it starts others, which must not have torch's threads for a parent.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"{source} cannot be converted for another number of processes. Resume with as many as wrote it. DeepSpeed "
            f"says:\n{result.stderr.strip()[-2000:]}"
        )
