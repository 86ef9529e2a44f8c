"""What a tiny training run needs besides a model: tokenised examples, an index over them, arguments of a Trainer."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from tiny_models import VOCAB
from transformers import TrainingArguments

from tokenseek.decoder.names import spelled_for_trainer
from tokenseek.index import IndexHeader, ScoredExample, ShardStore, merge_shards, tokens_crc

# The prompt is any share of an example, so that equal numbers of selected tokens carry unequal numbers of losses.
LENGTHS = (9, 21, 14, 6, 17, 11, 24, 8)
PROMPTS = (7, 19, 1, 2, 16, 9, 3, 2)


def tiny_dataset(lengths=LENGTHS, prompts=PROMPTS, seed: int = 0) -> datasets.Dataset:
    """What `tokenseek.prepare_dataset` gives: `example_id`, `input_ids` and `labels`, -100 on the prompt."""
    generator = np.random.default_rng(seed)
    rows = []
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids = generator.integers(3, VOCAB, length)
        labels = np.where(np.arange(length) < prompt, -100, ids)
        rows.append({"example_id": f"{row:08d}-x", "input_ids": ids.tolist(), "labels": labels.tolist()})
    return datasets.Dataset.from_list(rows)


def write_index(path: Path, dataset: datasets.Dataset, fingerprints: dict | None = None, seed: int = 0) -> Path:
    """An index with random scores for every example."""
    generator = np.random.default_rng(seed)
    scored = [
        ScoredExample(
            example_id=example["example_id"],
            row=row,
            tokens_crc=tokens_crc(example["input_ids"]),
            context=generator.random(len(example["input_ids"])),
            gradient=generator.random(len(example["input_ids"])),
        )
        for row, example in enumerate(dataset)
    ]
    tokens = sum(example.num_tokens for example in scored)
    header = IndexHeader(fingerprints or {"model": "tiny"}, num_examples=len(scored), num_tokens=tokens)
    store = ShardStore(path.with_suffix(".shards"), header, num_shards=1)
    store.write(0, scored)
    merge_shards(store.directory, path)
    return path


def tiny_arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **options) -> TrainingArguments:
    """Batches of two in the order of the data, two of them to a step, plain SGD, nothing written."""
    values = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        # Defaults that TRL changes.
        bf16=False,
        activation_checkpointing=False,
    )
    return cls(**spelled_for_trainer(values | options))
