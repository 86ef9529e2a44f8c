"""Copies to the host and back beside the device's own work, rehearsed without a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from closeness import assert_close, errors
from numerics.test_ditching import copied, gradients
from tiny_models import tiny_model

import tokenseek
from benchmarks.memory import LiveStorages
from tokenseek import SelectionRule
from tokenseek.decoder.device import planned_for
from tokenseek.ditching import Seeking
from tokenseek.ditching.lanes import NoLane, lane_of, lanes_made_by
from tokenseek.ditching.storage import Kept, Shelf

LAYERS = 4


class LateLane:
    """Copies as late as a stream may: when somebody waits for one, and then those before it and no others."""

    def __init__(self):
        self.queued, self.done, self.waits = [], 0, []

    def run(self, copy, on_device):
        self.queued.append(copy)
        return len(self.queued)

    def wait(self, until):
        self.waits.append((until, len(self.queued)))
        for place in range(self.done, until):
            self.queued[place]()
            self.queued[place] = None
        self.done = max(self.done, until)


@contextmanager
def late():
    lane = LateLane()
    with lanes_made_by(lambda device: lane):
        yield lane


def make_batch(tokens=120):
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, labels=ids)


SELECTED = torch.arange(5, 120, 7)[None]


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
@pytest.mark.parametrize("storage", ["host", "int8_host"])
@pytest.mark.parametrize("heads", [1, 4], ids=["keys and values", "or hidden states"])
def test_nothing_is_read_before_it_has_arrived(storage, recompute, heads, uninitialized_is_nan):
    model = tiny_model("llama", num_key_value_heads=heads, dtype=torch.float64)
    tokenseek.enable_token_ditching(model, recompute=recompute)
    expected = copied(gradients(model, model(**make_batch(), selected_positions=SELECTED).loss))
    tokenseek.enable_token_ditching(model, recompute=recompute, kv_storage=storage)
    with late() as lane:
        actual = gradients(model, model(**make_batch(), selected_positions=SELECTED).loss)
    assert lane.done == len(lane.queued) > LAYERS
    if storage == "host":
        assert_close(actual, expected)
    else:
        assert max(errors(actual, expected).values()) < 0.05


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_a_layer_is_on_its_way_while_the_one_after_it_is_at_work(recompute):
    model = tokenseek.enable_token_ditching(tiny_model("llama"), recompute=recompute, kv_storage="host")
    with late() as lane:
        loss = model(**make_batch(), selected_positions=SELECTED).loss
        out = len(lane.queued)
        assert out == 2 * LAYERS and not lane.waits  # of each layer, keys and values
        loss.backward()
    assert len(lane.queued) == 2 * out
    # When the first of a layer is waited for, the other and those of the next layer have been asked for.
    assert [(asked - out) / 2 for _, asked in lane.waits] == [2, 2, 3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("recompute", [False, True], ids=["store", "recompute"])
def test_what_was_recorded_is_fetched_in_the_order_of_the_second_pass(recompute, uninitialized_is_nan):
    model = tiny_model("llama", dtype=torch.float64)
    rule = SelectionRule("top", ratio=0.2, alpha=0, beta=1)
    results = []
    for storage in ("device", "host"):
        tokenseek.enable_token_ditching(model, recompute=recompute, kv_storage=storage, seeking=Seeking("l2"))
        with late() as lane:
            output = model(**make_batch(), selection=rule, selection_keys=torch.tensor([1]))
            results.append((output.loss.detach(), copied(gradients(model, output.loss))))
    assert len(lane.queued) == 2 * 2 * 2 * LAYERS  # recorded and taken, kept and taken again
    torch.testing.assert_close(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1])


def test_one_layer_at_most_is_fetched_ahead():
    shelf, live = Shelf(), []
    with late() as lane:
        for _ in range(5):
            board = shelf.board()
            live.append([Kept(torch.randn(1, 2, 6, 4).transpose(1, 2), "host", board) for _ in range(2)])
        fetched = []
        for keys, values in reversed(live):
            fetched.append((keys.restore(), values.restore()))
            held = sum(away._coming is not None for layer in live for kept in layer for away in kept._away)
            assert held <= 2
        again = live[4][0].restore()  # of a graph that is kept
    assert fetched[0][0].stride() == again.stride() and torch.equal(fetched[0][0], again)
    assert len(lane.queued) == 2 * 10 + 1


def test_which_lane():
    cpu = torch.device("cpu")
    assert lane_of(cpu) is None
    with planned_for("cuda"):
        assert isinstance(lane_of(cpu), NoLane)


def test_a_plan_counts_the_layer_that_is_fetched_ahead():
    model = tokenseek.enable_token_ditching(tiny_model("llama", num_hidden_layers=8), kv_storage="host")
    alive = []
    for kind in (None, "cuda"):
        with planned_for(kind):
            loss = model(**make_batch(2000), selected_positions=torch.tensor([[900, 1999]])).loss
            with LiveStorages().ignore([*model.parameters()]) as live:
                loss.backward()
            model.zero_grad()
            alive.append(live.peak)
    of_a_layer = 2 * 2000 * 2 * 8 * 4
    assert alive[1] - alive[0] == pytest.approx(of_a_layer, rel=0.2)
