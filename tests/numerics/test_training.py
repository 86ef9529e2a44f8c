"""One step of training is the same step from every loop: two optimizer steps of SGD against Algorithm 1 done densely.

SGD, since Adam divides a wrong scale of the gradient away. Every batch is padded, and the micro batches of a step hold
unequal numbers of supervised selected tokens, so that a mean of means is another step.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from closeness import assert_close, tolerance
from helpers import tiny_tokenizer
from numerics.dense_reference import dense_loss
from tiny_models import tiny_model
from tiny_run import tiny_arguments, tiny_dataset, write_index
from torch.utils.data import DataLoader
from transformers import Trainer

import tokenseek
from tokenseek import PaddingCollator, TokenSeekCollator, TokenSeekTrainer, UserError
from tokenseek.decoder.find import find_decoder

BATCH, ACCUMULATION, RATE = 2, 2, 0.5
LORA = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def dataset():
    return tiny_dataset()


@pytest.fixture(scope="module")
def index(dataset, tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("index") / "index.arrow", dataset)


def plain_model(dtype=torch.float64):
    return tiny_model("llama", dtype=dtype)


def lora_model():
    torch.manual_seed(0)
    return peft.get_peft_model(plain_model(), LORA, autocast_adapter_dtype=False)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def chunks(sequence, size):
    return [sequence[i : i + size] for i in range(0, len(sequence), size)]


def dense_training(model, dataset, collator, mean_of_means=False):
    """The truth: loss of every step and the trained parameters.

    Takes nothing but the choice of positions from the collator; which of them carry a loss is worked out here.
    """
    losses = []
    for step in chunks(list(dataset), BATCH * ACCUMULATION):
        batches, counts = [], []
        for examples in chunks(step, BATCH):
            chosen = [collator.select(example).tolist() for example in examples]
            following = [[*example["labels"][1:], -100] for example in examples]
            counts.append(sum(f[p] != -100 for f, positions in zip(following, chosen, strict=True) for p in positions))
            longest = max(map(len, chosen))
            positions = torch.tensor([[*p, *[-1] * (longest - len(p))] for p in chosen])
            batches.append({**PaddingCollator()(examples), "selected_positions": positions})
        assert len(set(counts)) == ACCUMULATION and min(counts) > 0
        model.zero_grad()
        losses.append(0.0)
        for batch, count in zip(batches, counts, strict=True):
            items = ACCUMULATION * count if mean_of_means else sum(counts)
            loss = dense_loss(model, **batch, num_items_in_batch=items)
            loss.backward()
            losses[-1] += loss.item()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
    return losses, trainable(model)


def by_hand(model, dataset, collator, folder, activation_checkpointing=False, bf16=False):
    tokenseek.enable_token_ditching(model, recompute=activation_checkpointing).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in chunks(list(DataLoader(dataset, BATCH, collate_fn=collator)), ACCUMULATION):
        num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        losses.append(0.0)
        for batch in step:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch, num_items_in_batch=num_items).loss
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def by_tokenseek_trainer(model, dataset, collator, folder, **options):
    trainer = TokenSeekTrainer(model, tiny_arguments(folder, **options), data_collator=collator, train_dataset=dataset)
    trainer.train()
    return logged(trainer)


def by_plain_trainer(model, dataset, collator, folder, **options):
    tokenseek.enable_token_ditching(model)
    trainer = Trainer(model, tiny_arguments(folder, **options), data_collator=collator, train_dataset=dataset)
    trainer.train()
    return logged(trainer)


def sft_trainer(model, dataset, collator, folder, peft_config=None, **options):
    trl = pytest.importorskip("trl")
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, **options}
    return trl.SFTTrainer(
        tokenseek.enable_token_ditching(model),
        tiny_arguments(folder, trl.SFTConfig, **options),
        data_collator=collator,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def by_sft_trainer(*args, **options):
    trainer = sft_trainer(*args, **options)
    trainer.train()
    return logged(trainer)


def update_error(model, before, expected):
    """Relative error of the whole update of the parameters from `before`."""
    after = trainable(model)
    assert after.keys() == expected.keys()
    wrong = sum((after[name] - expected[name]).double().square().sum() for name in expected)
    moved = sum((expected[name] - before[name]).double().square().sum() for name in expected)
    return (wrong / moved).sqrt().item()


LOOPS = [by_hand, by_tokenseek_trainer, by_plain_trainer, by_sft_trainer]
# TRL's head computes in float32.
PRECISION = {loop: torch.float32 if loop is by_sft_trainer else torch.float64 for loop in LOOPS}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize("build", [plain_model, lora_model])
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_takes_the_same_steps(loop, build, checkpointing, dataset, index, tmp_path):
    model, collator = build(), TokenSeekCollator(index, 0.3, "top")
    before = trainable(model)
    expected_losses, expected = dense_training(copy.deepcopy(model), dataset, collator)
    calls = []
    find_decoder(model).layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    losses = loop(model, dataset, collator, tmp_path, activation_checkpointing=checkpointing)

    assert len(calls) == 4 * (3 if checkpointing else 2)  # four micro batches; selected rows run once more
    # Trainers add losses up in float32.
    assert_close(losses, expected_losses, torch.float32)
    assert update_error(model, before, expected) < tolerance(PRECISION[loop])


@pytest.mark.parametrize("loop", LOOPS)
def test_packed_batches_take_the_same_steps(loop, dataset, index, tmp_path):
    model = lora_model()
    before = trainable(model)
    expected_losses, expected = dense_training(copy.deepcopy(model), dataset, TokenSeekCollator(index, 0.3, "top"))
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    losses = loop(model, dataset, TokenSeekCollator(index, 0.3, "top", packing=True), tmp_path)
    hook.remove()
    assert sorted(shapes) == sorted((1, len(a) + len(b)) for a, b in chunks(dataset["input_ids"], BATCH))
    assert_close(losses, expected_losses, torch.float32)
    assert update_error(model, before, expected) < tolerance(PRECISION[loop])


@pytest.mark.parametrize("loop", [by_plain_trainer, by_sft_trainer])
def test_row_30_label_smoothing_is_refused_by_name(loop, dataset, index, tmp_path):
    with pytest.raises(UserError, match="label_smoothing_factor and compute_loss_func are incompatible with a selec"):
        loop(plain_model(), dataset, TokenSeekCollator(index, 0.3, "top"), tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("loop", [by_plain_trainer, by_sft_trainer])
def test_label_smoothing_is_refused_where_the_model_selects(loop, dataset, tmp_path):
    collator = TokenSeekCollator(ratio=0.3)
    with pytest.raises(UserError, match="label_smoothing_factor and compute_loss_func take the labels away"):
        loop(plain_model(), dataset, collator, tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("by", ["selection", "selected_weights"])
def test_a_trainer_that_computes_the_loss_itself_is_refused_what_it_would_ignore(by, dataset, index, tmp_path):
    """It would train on all tokens, or on tokens without their weights."""
    collator = TokenSeekCollator() if by == "selection" else TokenSeekCollator(index)
    with pytest.raises(UserError, match=f"{by} came to the model's body.*compute_loss = transformers.Trainer"):
        by_sft_trainer(plain_model(), dataset, collator, tmp_path)


def test_a_mean_of_means_is_another_step(dataset, index):
    """What the tests above would miss if the micro batches happened to hold equal numbers of losses."""
    model, collator = plain_model(), TokenSeekCollator(index, 0.3, "top")
    before = trainable(model)
    _, expected = dense_training(copy.deepcopy(model), dataset, collator)
    dense_training(model, dataset, collator, mean_of_means=True)
    assert update_error(model, before, expected) > 0.1


def test_bfloat16_autocast(dataset, index, tmp_path):
    collator = TokenSeekCollator(index, 0.3, "top")
    before = trainable(plain_model(torch.float32))
    exact = plain_model(torch.float32)
    _, expected = dense_training(exact, dataset, collator)
    manual = plain_model(torch.float32)
    losses = by_hand(manual, dataset, collator, tmp_path, bf16=True)
    assert 1e-4 < update_error(manual, before, expected) < 0.1  # bfloat16 was used, and well
    for loop in (by_tokenseek_trainer, by_plain_trainer):
        model = plain_model(torch.float32)
        assert_close(loop(model, dataset, collator, tmp_path, bf16=True), losses, torch.float32)
        assert update_error(model, before, trainable(manual)) < tolerance(torch.float32)


def test_sft_trainer_wraps_the_model_in_an_adapter_itself(dataset, index, tmp_path):
    collator, truth = TokenSeekCollator(index, 0.3, "top"), lora_model()
    before = trainable(truth)
    model = plain_model()
    torch.manual_seed(0)
    trainer = sft_trainer(model, dataset, collator, tmp_path, peft_config=LORA)
    trainer.model.load_state_dict(truth.state_dict())
    expected_losses, expected = dense_training(truth, dataset, collator)
    trainer.train()
    # TRL holds adapters in float32.
    assert_close(logged(trainer), expected_losses, torch.float32)
    assert update_error(trainer.model, before, expected) < tolerance(torch.float32)


def test_metrics_of_sft_trainer_are_those_of_the_selected_tokens(index, dataset, tmp_path):
    """Entropy and accuracy of the first step, from the logits of the model before it."""
    model, collator = plain_model(), TokenSeekCollator(index, 0.3, "top")
    rows = list(dataset)[: BATCH * ACCUMULATION]
    for example in rows[::2]:  # labels that the model gets right, in half of the examples
        with torch.no_grad():
            best = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].argmax(-1)
        example["labels"] = [
            label if label == -100 else best[t - 1].item() for t, label in enumerate(example["labels"])
        ]
    entropies, hits = [], []
    for micro_batch in chunks(rows, BATCH):
        entropy, hit = [], []
        for example in micro_batch:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
            for position in collator.select(example):
                label = [*example["labels"], -100][position + 1]
                if label != -100:
                    entropy.append(torch.distributions.Categorical(logits=logits[position]).entropy())
                    hit.append(float(logits[position].argmax() == label))
        entropies.append(sum(entropy) / len(entropy))
        hits.append(sum(hit) / len(hit))
    trainer = sft_trainer(model, rows_as_dataset(dataset, rows), collator, tmp_path)
    trainer.train()
    assert 0 < sum(hits) / ACCUMULATION < 1
    assert_close(logged(trainer, "entropy"), [float(sum(entropies)) / ACCUMULATION], torch.float32)
    assert_close(logged(trainer, "mean_token_accuracy"), [sum(hits) / ACCUMULATION], torch.float32)
    assert logged(trainer, "num_tokens") == [sum(len(example["input_ids"]) for example in rows)]


def rows_as_dataset(like, rows):
    return type(like).from_list(rows, features=like.features)


def test_sft_trainer_trains_experts_without_their_auxiliary_loss_only(dataset, index, tmp_path):
    """The auxiliary loss balances all tokens over the experts; there are no router logits of the unselected ones."""
    collator = TokenSeekCollator(index, 0.3, "top")
    with pytest.raises(UserError, match="output_router_logits"):
        by_sft_trainer(tiny_model("qwen3_moe"), dataset, collator, tmp_path)
    losses = by_sft_trainer(tiny_model("qwen3_moe"), dataset, collator, tmp_path, router_aux_loss_coef=0.0)
    assert_close(losses, by_hand(tiny_model("qwen3_moe"), dataset, collator, tmp_path), torch.float32)
