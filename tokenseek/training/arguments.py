"""Transformers' arguments of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from tokenseek.config import DitchingSettings, TrainingConfig
from tokenseek.decoder.names import spelled_for_trainer


def training_arguments(training: TrainingConfig, output: Path, seed: int) -> TrainingArguments:
    """Transformers' arguments of a run; what is not set here keeps Transformers' default."""
    own = training.model_dump(exclude=set(DitchingSettings.model_fields))
    own["per_device_train_batch_size"] = training.micro_batch
    if own["optim"] == "adamw_torch" and torch.cuda.is_available():
        # torch's choice on a GPU allocates the square roots of all second moments at once.
        own["optim"] = "adamw_torch_fused"
    extra = dict(training.extra)
    if training.save_strategy == "best" or training.load_best or training.early_stopping_patience:
        extra.setdefault("metric_for_best_model", "loss")  # the held-out one
    if training.load_best:
        own["load_best_model_at_end"] = True
    if training.early_stopping_patience:
        own["restore_callback_states_from_checkpoint"] = True  # a resumed run continues the counts
    return TrainingArguments(
        output_dir=str(output),
        seed=seed,
        bf16=training.mixed_precision == "bf16",
        fp16=training.mixed_precision == "fp16",
        use_cpu=not torch.accelerator.is_available(),  # or each of several CPU processes would train alone
        remove_unused_columns=False,
        include_num_input_tokens_seen="all" if training.packing else "non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        **own,
        **spelled_for_trainer(extra),
    )
