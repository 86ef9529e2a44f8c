"""A run ends at a loss or gradient that is not finite, and says where."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model
from tiny_run import tiny_arguments, tiny_dataset, write_index
from torch import nn

from tokenseek import PaddingCollator, TokenSeekCollator, TokenSeekTrainer, UserError
from tokenseek.training import GroupTrainer


@pytest.fixture(scope="module")
def dataset():
    return tiny_dataset()


@pytest.fixture(scope="module")
def index(dataset, tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("index") / "index.arrow", dataset)


def make_trainer(kind, dataset, index, folder, **options):
    on_nan = options.pop("on_nan", "stop")
    arguments = tiny_arguments(folder, **options)
    if kind == "ditching":
        collator, cls = TokenSeekCollator(index, 0.5, "top"), TokenSeekTrainer
    else:
        collator, cls = PaddingCollator(), GroupTrainer
    return cls(tiny_model("llama"), arguments, data_collator=collator, train_dataset=dataset, on_nan=on_nan)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def break_example(trainer, example, value):
    """The logits of batches that hold an example become `value`; example 4 is in the first micro-batch of step 2."""
    model, ids = trainer.model, trainer.train_dataset[example]["input_ids"]

    def poison(module, args, kwargs, output):
        given = kwargs["input_ids"]
        if any(row[: len(ids)].tolist() == ids for row in given):
            output.loss = output.loss * value
        return output

    model.register_forward_hook(poison, with_kwargs=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["ditching", "full"])
@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_the_step_and_the_examples_are_named(dataset, index, tmp_path, kind, value, max_grad_norm):
    trainer = make_trainer(kind, dataset, index, tmp_path, max_grad_norm=max_grad_norm)
    break_example(trainer, 4, value)
    with pytest.raises(UserError, match=f"step 2: the loss is {value}.*Examples: 00000004-x, 00000005-x. Lower"):
        trainer.train()
    assert trainer.state.global_step == 1 and weights(trainer.model).isfinite().all()


@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_a_gradient_alone(dataset, index, tmp_path, max_grad_norm):
    trainer = make_trainer("ditching", dataset, index, tmp_path, max_grad_norm=max_grad_norm)
    before = weights(trainer.model)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match="step 1: the norm of the gradient is nan, though.*00000000-x.*00000003-x"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_on_nan_continue(dataset, index, tmp_path):
    trainer = make_trainer("ditching", dataset, index, tmp_path, on_nan="continue")
    break_example(trainer, 4, float("nan"))
    trainer.train()
    assert trainer.state.global_step == 2 and not weights(trainer.model).isfinite().all()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[1] != logged[1], json.dumps(logged)  # not hidden behind the mean of those before


def test_one_transfer_a_step(dataset, index, tmp_path, monkeypatch):
    """However many micro-batches a step has."""
    trainer = make_trainer("ditching", dataset, index, tmp_path, gradient_accumulation_steps=4)
    calls, original = [], torch.Tensor.tolist

    def counted(self):
        calls.append(self.shape)
        return original(self)

    run = trainer.stop_at_nan.on_pre_optimizer_step

    def watched(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", counted)
            patch.setattr(torch.Tensor, "item", None)
            return run(*args, **kwargs)

    monkeypatch.setattr(trainer.stop_at_nan, "on_pre_optimizer_step", watched)
    trainer.train()
    assert calls == [torch.Size([5])]


def test_other_values_are_refused(dataset, index, tmp_path):
    with pytest.raises(UserError, match="on_nan is 'ignore'; it must be 'stop' or 'continue'"):
        make_trainer("full", dataset, index, tmp_path, on_nan="ignore")


def test_data_without_example_ids(index, tmp_path):
    """A plain data set of one's own: the step is named all the same."""
    plain = tiny_dataset().remove_columns("example_id")
    trainer = make_trainer("full", plain, index, tmp_path)
    nn.init.constant_(trainer.model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="step 1: the loss is nan.*without example_id"):
        trainer.train()
