"""One step of training is the same step from every loop: two optimizer steps of SGD against Algorithm 1 done densely.

SGD, since Adam divides a wrong scale of the gradient away. Every batch is padded, and the micro batches of a step hold
unequal numbers of supervised selected tokens, so that a mean of means is another step.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers import tiny_tokenizer
from numerics.dense_reference import dense_loss
from tiny_index import tiny_dataset, write_index
from tiny_models import tiny_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import tokenseek
from tokenseek import PaddingCollator, TokenSeekCollator, TokenSeekTrainer, UserError

BATCH, ACCUMULATION, STEPS, RATE = 2, 2, 2, 0.5
LORA = dict(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def dataset():
    return tiny_dataset()


@pytest.fixture(scope="module")
def index(dataset, tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("index") / "index.arrow", dataset)


def arguments(folder, cls=TrainingArguments, **options):
    values = dict(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return cls(**values | options)


def lora_model(**options):
    model = peft.get_peft_model(tiny_model("llama", dtype=torch.float64), peft.LoraConfig(**LORA, **options), autocast_adapter_dtype=False)
    return model


def plain_model():
    return tiny_model("llama", dtype=torch.float64)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def chunks(sequence, size):
    return [sequence[i : i + size] for i in range(0, len(sequence), size)]


# --- the truth, and a loop by hand ---------------------------------------------------------------------------------


def dense_training(model, dataset, collator, mean_of_means=False):
    """Losses of the steps and the trained parameters. Labels are the data's own: what counts is worked out here."""
    losses = []
    for step in chunks(list(dataset), BATCH * ACCUMULATION)[:STEPS]:
        batches, counts = [], []
        for examples in chunks(step, BATCH):
            batch = PaddingCollator()(examples)
            chosen = [collator.select(example) for example in examples]
            counts.append(
                sum(p + 1 < len(e["labels"]) and e["labels"][p + 1] != -100 for e, ps in zip(examples, chosen) for p in ps)
            )
            longest = max(map(len, chosen))
            positions = torch.tensor([[*p, *[-1] * (longest - len(p))] for p in chosen])
            batches.append(dict(batch, selected_positions=positions))
        assert len(set(counts)) > 1 and min(counts) > 0
        model.zero_grad()
        losses.append(0.0)
        for batch, count in zip(batches, counts):
            items = count * ACCUMULATION if mean_of_means else sum(counts)
            loss = dense_loss(model, **batch, num_items_in_batch=items)
            loss.backward()
            losses[-1] += loss.item()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= RATE * p.grad
    return losses, trainable(model)


def by_hand(model, dataset, collator, folder, **options):
    tokenseek.enable_token_ditching(model, recompute=options.pop("gradient_checkpointing", False)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    batches = list(DataLoader(dataset, BATCH, collate_fn=collator))
    losses = []
    for step in chunks(batches, ACCUMULATION)[:STEPS]:
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        losses.append(0.0)
        for batch in step:
            loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def logged_losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def by_tokenseek_trainer(model, dataset, collator, folder, **options):
    trainer = TokenSeekTrainer(model, arguments(folder, **options), data_collator=collator, train_dataset=dataset)
    trainer.train()
    return logged_losses(trainer)


def by_plain_trainer(model, dataset, collator, folder, **options):
    tokenseek.enable_token_ditching(model)
    trainer = Trainer(model, arguments(folder, **options), data_collator=collator, train_dataset=dataset)
    trainer.train()
    return logged_losses(trainer)


def by_sft_trainer(model, dataset, collator, folder, **options):
    trl = pytest.importorskip("trl")
    tokenseek.enable_token_ditching(model)
    collator.shift_labels = True
    options.setdefault("dataset_kwargs", {"skip_prepare_dataset": True})
    trainer = trl.SFTTrainer(
        model,
        arguments(folder, trl.SFTConfig, **options),
        data_collator=collator,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return logged_losses(trainer)

LOOPS = [by_hand, by_tokenseek_trainer, by_plain_trainer, by_sft_trainer]

def relative_error(model, before, expected):
    """Of the whole update."""
    after = trainable(model)
    assert after.keys() == expected.keys()
    wrong = sum((after[n] - expected[n]).square().sum() for n in expected)
    moved = sum((expected[n] - before[n]).square().sum() for n in expected)
    return (wrong / moved).sqrt().item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize("build", [plain_model, lora_model])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_takes_the_same_steps(loop, build, checkpointing, dataset, index, tmp_path):
    model = build()
    before = trainable(model)
    collator = TokenSeekCollator(index, ratio=0.3)
    losses, expected = dense_training(copy.deepcopy(model), dataset, collator)
    actual = loop(model, dataset, collator, tmp_path, gradient_checkpointing=checkpointing)
    err = relative_error(model, before, expected)
    print(loop.__name__, err, [a - b for a, b in zip(actual, losses)])
    assert err < 1e-5
    assert actual == pytest.approx(losses, rel=1e-5)
