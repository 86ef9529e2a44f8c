"""What the weights of a run depend on, as values that can be compared with those of another run.

A run writes them to `fingerprint.json` in its folder; a run that is resumed there is told what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from tokenseek.config import RunConfig, TrainingConfig
from tokenseek.data.encoding import digest
from tokenseek.runs.inputs import RunInputs

# Settings without an effect on the weights: names of what `content` has digests of, paths, speed, memory and reports.
_WITHOUT_EFFECT: dict[str, Any] = {
    "output_dir": True,
    "data": True,
    "eval_data": True,
    "model": {"name_or_path", "revision", "attn_implementation", "trust_remote_code"},
    "scoring": {"index", "tokens_per_batch", "tokens_per_shard", "cpu_threads"},
    "training": {
        *("recompute", "tile_rows", "sequence_layout", "memory_budget", "compile", "liger", "on_nan", "resume"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),  # as `batch`
        *("num_train_epochs", "max_steps"),  # as `length`
        *("logging_steps", "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"),
        *("dataloader_num_workers", "report_to", "sample_prompts", "push_to_hub", "hub_model_id"),
    },
}
_EXTRA_WITHOUT_EFFECT = (
    *("logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "ddp_", "include_", "trackio_"),
    *("dataloader_num", "dataloader_pin", "dataloader_p", "disable_tqdm", "run_name", "project", "skip_memory_metrics"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_empty_cache_steps", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better"),
)


def fingerprint_run(
    config: RunConfig, inputs: RunInputs, training: Dataset, held_out: Dataset | None, groups: int
) -> dict[str, Any]:
    """Everything that the weights of a run depend on.

    Args:
        config: without `auto`.
        training, held_out: the examples to train on, and those of the held-out loss.
        groups: processes, or groups of those that share texts.

    Returns:
        `settings` by dotted path; `content`, digests of the model and of the data; `names`, the settings that name
        these, shown where a digest differs; `batch`, the rows of a step; `length`, how long the run trains.
    """
    settings = dict(_flat(config.model_dump(mode="json", exclude=_without_effect(config))))
    extra = "training.extra."
    settings = {k: v for k, v in settings.items() if not k.removeprefix(extra).startswith(_EXTRA_WITHOUT_EFFECT)}
    evaluated = {}
    if held_out is not None and _goes_by_held_out(config.training):
        evaluated = {"held-out examples": digest(*held_out["example_id"])}
    named: dict[str, Any] = {"model": {"name_or_path", "revision"}, "data": True}
    own = config.training
    return {
        "settings": settings,
        "content": {**inputs.fingerprints, "training examples": digest(*training["example_id"])} | evaluated,
        "names": dict(_flat(config.model_dump(mode="json", include=named))),
        "batch": own.micro_batch * own.gradient_accumulation_steps * groups,
        "length": {"max_steps": own.max_steps, "num_train_epochs": own.num_train_epochs},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two fingerprints, apart from the length: both values, by the names of settings."""
    found = _changed(before["settings"], now["settings"])
    if before["batch"] != now["batch"]:
        name = "training.per_device_train_batch_size x gradient_accumulation_steps x processes"
        found[name] = _both(before["batch"], now["batch"])
    contents, names = _changed(before["content"], now["content"]), _changed(before["names"], now["names"])
    for section, keys in (("model", contents.keys() & {"model"}), ("data", contents.keys() - {"model"})):
        if keys:
            named = {name: text for name, text in names.items() if name.startswith(f"{section}.")}
            found |= named or {section: f"other content under the same settings ({', '.join(sorted(keys))})"}
    return found


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    pairs = {name: (before.get(name), now.get(name)) for name in [*before, *now]}
    return {name: _both(*pair) for name, pair in pairs.items() if pair[0] != pair[1]}


def _without_effect(config: RunConfig) -> dict[str, Any]:
    without, training = dict(_WITHOUT_EFFECT), config.training
    more = {name for name, same in (("kv_storage", "int8"), ("packing", "bins")) if getattr(training, name) != same}
    without["training"] = without["training"] | more
    if _goes_by_held_out(training):
        without["training"] -= {"eval_strategy", "eval_steps"}
    if not training.ditching:
        without |= {"selection": True, "scoring": True}
    elif config.scoring.mode == "index" and not config.needs_index:
        without["scoring"] = True
    return without


def _goes_by_held_out(training: TrainingConfig) -> bool:
    """Whether evaluations decide on weights."""
    by_loss = training.lr_scheduler_type == "reduce_lr_on_plateau"
    return training.load_best or training.early_stopping_patience is not None or by_loss


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from _flat({str(number): item for number, item in enumerate(value)}, f"{name}.")
        else:
            yield name, value


def _both(before: Any, now: Any) -> str:
    return f"{shown(before)} there, {shown(now)} now"


def shown(value: Any) -> str:
    """A setting's value in a message, as YAML writes it but for none."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
