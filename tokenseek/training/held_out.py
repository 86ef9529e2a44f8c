"""The loss on data that is held out, of which early stopping and the best checkpoint go too."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from tokenseek.labels import IGNORED
from tokenseek.training.evaluating import loss_in_pieces


def held_out_loss(trainer: Any, dataset: Dataset) -> float:
    """Mean cross-entropy over all supervised tokens of a data set, in nats per token.

    Unlike a mean over batches it does not depend on the batch size, the number of processes or the padding. Leaves the
    model in evaluation mode, as Trainer does, whose steps begin by training mode.

    Args:
        trainer: a :class:`~tokenseek.training.GroupTrainer`, which calls this and so cannot be imported here.
    """
    accelerator = trainer.accelerator
    per_round = trainer.args.eval_batch_size * trainer.num_groups
    # Samplers repeat examples to give every process as many; blank ones that carry no loss stand there instead.
    if filling := -len(dataset) % per_round:
        blank = {**dataset[0], "labels": [IGNORED] * len(dataset[0]["labels"])}
        dataset = concatenate_datasets([dataset, Dataset.from_list([blank] * filling, features=dataset.features)])
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(dataset):
            count = batch["labels"][:, 1:].ne(IGNORED).sum().item()
            in_pieces = loss_in_pieces(model, batch["labels"].shape, accelerator.autocast)
            with trainer.compute_loss_context_manager(), in_pieces:
                loss = model(**batch, num_items_in_batch=1, use_cache=False).loss.item()
            total += torch.tensor([loss, count], dtype=torch.float64)
    loss, count = accelerator.reduce(total.to(accelerator.device, torch.float32), reduction="sum").tolist()
    return float(loss / count)
