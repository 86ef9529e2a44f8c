"""What a training run needs besides a model: checked before anything is scored or loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from tokenseek.config import RunConfig, TrainingConfig
from tokenseek.errors import UserError, first_line
from tokenseek.launching.processes import whole_models
from tokenseek.spelling import did_you_mean
from tokenseek.training.arguments import training_arguments

_SCHEDULED_STEPS = 100


def make_output(output: Path) -> None:
    """Make a run's folder.

    Raises:
        UserError: it is a file, or nothing can be written into it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        at = next((path for path in (output, *output.parents) if path.exists()), output)
        raise UserError(f"output_dir: {at} is a file, not a folder; give another output_dir.") from error
    except OSError as error:
        raise UserError(
            f"output_dir: {output} cannot be written to ({error.strerror}); give a folder that can."
        ) from error


def require_arguments(config: RunConfig, skeleton: PreTrainedModel) -> None:
    """Make the arguments, the optimizer, the schedule and the logging of a run, to see whether they can be made.

    Args:
        skeleton: the model on the meta device.

    Raises:
        UserError: names the setting that is unknown, or lacks what it needs.
    """
    training = config.training
    known = [name.value for name in OptimizerNames]
    if training.optim not in known:
        raise UserError(
            f"training.optim: {training.optim!r} is not an optimizer of Transformers"
            f"{did_you_mean(training.optim, known)}; accepted are {', '.join(known)}."
        )
    _require_evaluation(config)
    if training.ditching and training.extra.get("label_smoothing_factor"):
        raise UserError(
            "training.extra.label_smoothing_factor is incompatible with token ditching, where the model computes the "
            "loss itself over the selected tokens. Leave it out, or set training.ditching=false."
        )
    try:
        with whole_models():  # arguments of ZeRO-3 would split the models that are made while they exist
            arguments = training_arguments(training, Path(config.output_dir), config.seed)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: Transformers does not accept these settings: {first_line(error)}") from error
    if arguments.deepspeed_plugin is None:
        _try_out(training, arguments, skeleton)


def require_a_batch(training: TrainingConfig, examples: int, groups: int) -> None:
    """Refuse data of which dropping the last, incomplete batches leaves nothing.

    Args:
        groups: processes, or groups of those that share texts.

    Raises:
        UserError: with `dataloader_drop_last` there is no whole batch.
    """
    per_round = training.micro_batch * groups
    if training.extra.get("dataloader_drop_last") and examples < per_round:
        raise UserError(
            f"training.extra.dataloader_drop_last: {examples} examples make no whole batch of {per_round} "
            f"(training.per_device_train_batch_size {training.micro_batch} x {groups} processes), so "
            "that no step is left. Set it to false, or use smaller batches."
        )


def require_reports(names: list[str]) -> None:
    """Refuse logging back ends that are unknown or not installed.

    Raises:
        UserError: names `training.report_to`.
    """
    for name in names:
        if name in ("none", "all"):
            if len(names) > 1:
                raise UserError(f"training.report_to: {name!r} stands alone, got {names}.")
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"training.report_to: {name!r} is not known{did_you_mean(name, INTEGRATION_TO_CALLBACK)}; accepted are "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(
                f"training.report_to: {name} cannot be used: {first_line(error)} Install it, or leave it out "
                "(training.report_to=[] logs to metrics.jsonl alone)."
            ) from error


def _require_evaluation(config: RunConfig) -> None:
    training = config.training
    if training.load_best and training.save_strategy not in ("best", training.eval_strategy):
        raise UserError(
            f"training.load_best takes the best of the checkpoints: save one at each evaluation, with "
            f"training.save_strategy={training.eval_strategy} and equal save_steps and eval_steps, or at each better "
            f"one, with training.save_strategy=best (got {training.save_strategy})."
        )
    if training.eval_strategy != "no":
        return
    needs = {
        "training.load_best": training.load_best,
        "training.save_strategy=best": training.save_strategy == "best",
        "training.early_stopping_patience": training.early_stopping_patience is not None,
        "training.sample_prompts": bool(training.sample_prompts),
        "training.lr_scheduler_type=reduce_lr_on_plateau": training.lr_scheduler_type == "reduce_lr_on_plateau",
        "training.extra.load_best_model_at_end": bool(training.extra.get("load_best_model_at_end")),
    }
    if found := [setting for setting, needed in needs.items() if needed]:
        data = (
            "" if config.eval_data or config.data.hold_out else " and held-out data (data.hold_out=100, or eval_data)"
        )
        raise UserError(
            f"{found[0]} needs evaluation during training: give training.eval_strategy=steps, "
            f"training.eval_steps{data}."
        )


def _try_out(training: TrainingConfig, arguments: TrainingArguments, skeleton: PreTrainedModel) -> None:
    """Make the optimizer and the schedule for one parameter."""
    parameters = [nn.Parameter(torch.zeros(1))]
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, skeleton)
        if "params" in options or "optimizer_dict" in options or "model" in options:
            return  # made around the parameters of the model itself
        optimizer_class(parameters, **options)
    except (ValueError, TypeError, ImportError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"training.optim: {training.optim} cannot be made: {first_line(error)}. Other settings of it are "
            "training.extra.optim_args and training.extra.optim_target_modules."
        ) from error
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD(parameters, lr=training.learning_rate),
            num_warmup_steps=0,
            num_training_steps=_SCHEDULED_STEPS,
            scheduler_specific_kwargs=cast(dict[str, Any], arguments.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"training.lr_scheduler_type: {training.lr_scheduler_type} cannot be made: {first_line(error)}. Give what "
            "it needs in training.extra.lr_scheduler_kwargs, such as {num_decay_steps: 100} for warmup_stable_decay."
        ) from error
