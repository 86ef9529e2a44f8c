"""Budgets of launched kernels, and what travels with a batch so that nothing waits for the device."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
import torch
from tiny_models import tiny_model
from tiny_run import tiny_arguments, tiny_dataset, write_index
from torch.utils._python_dispatch import _disable_current_modes
from transformers import TrainerCallback

import tokenseek
from benchmarks.launches import Launches, measure
from tokenseek import TokenSeekCollator, TokenSeekTrainer
from tokenseek.ditching import Seeking, online
from tokenseek.ditching.planned import PlannedRows
from tokenseek.ditching.rows import partition
from tokenseek.labels import IGNORED
from tokenseek.tiling.rows import MIN_SPAN_ROWS
from tokenseek.training.groups import _copy_beside_the_work
from tokenseek.training.trainer import PlanningCollator

BUDGETS = {
    # Of a layer, forward and backward, as shares of an ordinary one's; of what comes once, in the forward pass.
    "index": (1.42, 60),
    "index+recompute": (1.77, 75),
    "online+error": (1.41, 140),
    "online+exact": (1.42, 180),  # with the gradients of the weights above the border
    "exact layer": (1.0, 95),
    "score": (0.34, 146),
}


@pytest.fixture(scope="module")
def counts():
    return {method: measure(method, repeats=1) for method in ("full", *BUDGETS)}


@pytest.mark.parametrize("method", BUDGETS)
def test_budgets(counts, method):
    per_layer, fixed = BUDGETS[method]
    assert counts[method]["layer"] <= per_layer * counts["full"]["layer"], counts[method]["operations"]
    assert counts[method]["forward_fixed"] <= fixed, counts[method]["operations"]


def test_an_exact_layer_adds_little_to_what_a_step_by_the_error_has(counts):
    """What its weights' gradients add to the forward pass, the backward pass has less."""
    exact, error = counts["online+exact"], counts["online+error"]
    assert exact["forward_fixed"] + exact["backward_fixed"] < error["forward_fixed"] + error["backward_fixed"]


def test_a_layer_has_the_operations_of_its_two_passes_and_eight_more(counts):
    """docs/gpus.md names them. A pass without gradient has those of an ordinary layer's forward pass."""
    full, index = counts["full"], counts["index"]
    assert index["layer"] == full["layer"] + full["forward_layer"] + 8


def test_no_step_waits_for_the_device(counts):
    assert {counts[method]["syncs"] for method in ("index", "index+recompute", "score")} == {0}


def test_what_is_counted():
    x = torch.ones(4, 4)
    with Launches() as launches:
        y = (x @ x).t().reshape(2, 8).detach()
        torch.empty_like(y).expand(3, 2, 8)
        y.nonzero()
    assert dict(launches.operations) == {"mm": 1, "clone": 1, "nonzero": 1}
    assert launches.syncs.total() == 1


class Waits(TrainerCallback):
    """Where the host would wait for a GPU in an optimizer step, from its beginning to the look at its losses."""

    def __init__(self, monkeypatch):
        self.found, self._launches, self.looks = Counter(), None, 0
        for name in ("tolist", "cpu", "numpy"):  # which no dispatcher sees of tensors on a CPU
            monkeypatch.setattr(torch.Tensor, name, self._noted(name, getattr(torch.Tensor, name)))

    def _noted(self, name, original):
        def noted(tensor, *args, **kwargs):
            if self._launches is not None:
                self.found[name] += 1
            return original(tensor, *args, **kwargs)

        return noted

    def allowed(self, look):
        """`look`, in which the host may wait."""

        def looking(*args):
            self.looks += 1
            launches, self._launches = self._launches, None
            with _disable_current_modes():
                found = look(*args)
            self._launches = launches
            return found

        return looking

    def on_step_begin(self, *args, **kwargs):
        self._launches = Launches().__enter__()

    def on_pre_optimizer_step(self, *args, **kwargs):
        launches, self._launches = self._launches, None
        launches.__exit__(None, None, None)
        self.found += launches.syncs


def _on_its_way(collate):
    """What is planned leaves for a device, with all that the host is asked for afterwards."""

    def collated(*args):
        batch = collate(*args)
        batch["planned_rows"].to("meta")
        return batch

    return collated


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_no_wait_before_the_look_at_the_losses(tmp_path, monkeypatch, packing, kind):
    """Nor in any of a step's micro-batches, with the counts that a run keeps."""
    dataset = tiny_dataset()
    waits = Waits(monkeypatch)
    monkeypatch.setattr(PlanningCollator, "__call__", _on_its_way(PlanningCollator.__call__))
    trainer = TokenSeekTrainer(
        tiny_model(kind),
        tiny_arguments(
            tmp_path, max_steps=2, max_grad_norm=1.0, include_num_input_tokens_seen="all" if packing else "non_padding"
        ),
        data_collator=TokenSeekCollator(write_index(tmp_path / "index.arrow", dataset), 0.5, "top", packing=packing),
        train_dataset=dataset,
        callbacks=[waits],
    )
    trainer.train()
    assert not waits.found
    assert trainer.state.num_input_tokens_seen == sum(map(len, dataset["input_ids"]))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("exact_layers", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_step_that_selects_waits_for_its_scores_alone(tmp_path, monkeypatch, kind, exact_layers, packing):
    waits = Waits(monkeypatch)
    monkeypatch.setattr(online, "_select", waits.allowed(online._select))
    trainer = TokenSeekTrainer(
        tokenseek.enable_token_ditching(tiny_model(kind), seeking=Seeking("l2", exact_layers=exact_layers)),
        tiny_arguments(tmp_path, max_steps=2, learning_rate=0.01),
        data_collator=TokenSeekCollator(
            None, 0.5, "sampled", online=True, alpha=0, beta=1, explore=0.3, packing=packing
        ),
        train_dataset=tiny_dataset(),
        callbacks=[waits],
    )
    trainer.train()
    assert not waits.found and waits.looks == 4  # micro-batches


@pytest.mark.parametrize("on_gpu,pinned,beside", [(True, True, True), (True, False, False), (False, True, False)])
def test_batches_are_copied_beside_the_work(tmp_path, monkeypatch, on_gpu, pinned, beside):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    arguments = tiny_arguments(tmp_path)
    arguments.dataloader_pin_memory = pinned  # which `use_cpu` has unset
    _copy_beside_the_work(arguments)
    assert arguments.accelerator_config.non_blocking is beside


class TestPlannedRows:
    """Made where batches are collated, it gives the loss and gradients that the positions themselves give."""

    @staticmethod
    def batch(packing, lengths=(13, 9)):
        dataset = tiny_dataset(lengths, (2, 8))
        return TokenSeekCollator(None, 0.6, "random", packing=packing)(list(dataset))

    @pytest.mark.parametrize("packing", [False, True])
    @pytest.mark.parametrize("kind", ["llama", "opt", "qwen3_moe"])
    def test_same_loss_and_gradients(self, packing, kind):
        if packing and kind == "opt":
            pytest.skip("OPT takes no position_ids")
        model = tokenseek.enable_token_ditching(tiny_model(kind, dtype=torch.float64))
        batch = self.batch(packing)
        planned = pickle.loads(pickle.dumps(PlannedRows.of(batch, attention_is_ours=True)))  # as a worker sends it
        results = []
        for more in ({}, {"planned_rows": planned}):
            model.zero_grad()
            loss = model(**batch, **more).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for given, made in zip(*results, strict=True):
            torch.testing.assert_close(made, given, rtol=1e-12, atol=1e-14)

    def test_no_loss_at_all(self):
        model = tokenseek.enable_token_ditching(tiny_model("llama"))
        batch = self.batch(False)
        batch["shift_labels"].fill_(IGNORED)
        loss = model(**batch, planned_rows=PlannedRows.of(batch, True)).loss
        loss.backward()
        assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())

    def test_moves_with_its_batch(self):
        planned = PlannedRows.of(self.batch(True), True)
        moved = planned.to("meta", non_blocking=True)
        with Launches() as launches:
            rows = [moved.reach.parts.selected, *(own[0] for own in moved.reach.parts.examples)]
            assert {row.index_BR.device.type for row in rows} == {moved.targets_R.device.type} == {"meta"}
            assert [row.on_host for row in rows][0] == planned.reach.parts.selected.on_host
            assert rows[0].spans == planned.reach.parts.selected.spans
            assert rows[0]._slots.device.type == "meta"
        assert launches.count == 0


def test_a_gpu_gets_no_span_of_few_rows():
    parts = partition(torch.arange(0, 900, 2)[None], None, 900)
    assert len(parts.selected.spans) == min(4, 450 // MIN_SPAN_ROWS["cpu"])
    assert len(parts.to("meta").selected.spans) == 1
    assert len(partition(torch.arange(1100)[None], None, 1100).to("meta").selected.spans) == 4


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_taken_by_one_index(batch):
    """`gather` reads an index for every number that it takes, and adds them up one by one in its backward pass."""
    rows = partition(torch.arange(0, 40, 4).expand(batch, -1), None, 40).selected
    x_BTD = torch.randn(batch, 40, 8, requires_grad=True)
    with Launches() as launches:
        taken = rows.take(x_BTD, 1)
        taken.sum().backward()
    assert torch.equal(taken, x_BTD[:, ::4])
    assert launches.operations["index_select"] == 1 and not {"gather", "index"} & launches.operations.keys()
