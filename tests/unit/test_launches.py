"""Budgets of launched kernels, and what travels with a batch so that nothing waits for the device."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny_models import tiny_model
from tiny_run import tiny_arguments, tiny_dataset, write_index

import tokenseek
from benchmarks.launches import Launches, measure
from tokenseek import TokenSeekCollator, TokenSeekTrainer
from tokenseek.ditching.planned import PlannedRows
from tokenseek.ditching.rows import partition
from tokenseek.labels import IGNORED
from tokenseek.tiling.rows import MIN_SPAN_ROWS

BUDGETS = {
    # Of a layer, forward and backward, as shares of an ordinary one's; of what comes once, in the forward pass.
    "index": (1.42, 60),
    "index+recompute": (1.77, 75),
    "online+error": (1.41, 140),
    "online+exact": (1.47, 165),
    "exact layer": (1.56, 110),
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


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_one_sync_in_an_optimizer_step(tmp_path, packing, kind):
    """The look at the losses and the gradient, before the optimizer; the steps themselves have none."""
    dataset = tiny_dataset()
    index = write_index(tmp_path / "index.arrow", dataset)
    syncs = []

    class Counting(TokenSeekTrainer):
        def compute_loss(self, *args, **kwargs):
            with Launches() as launches:
                loss = super().compute_loss(*args, **kwargs)
            syncs.append(launches.syncs)
            return loss

    trainer = Counting(
        tiny_model(kind),
        tiny_arguments(tmp_path, max_steps=2),
        data_collator=TokenSeekCollator(index, 0.5, packing=packing),
        train_dataset=dataset,
    )
    trainer.train()
    assert len(syncs) == 4 and not any(step.total() for step in syncs), syncs


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
