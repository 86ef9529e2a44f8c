"""Bias and variance of gradients of selected tokens, as the benchmark measures them."""

import numpy as np
import pytest
import torch

from benchmarks.noise import WAYS, Noise, measure
from benchmarks.one_budget import select_of_whole_batch
from tokenseek.ditching import Seeking
from tokenseek.selection.batched import Example, draw_key


def test_an_estimate_without_bias_has_none():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(1000, generator=generator)
    noise = 0.5 * full.norm() / 1000**0.5  # of each number
    draws = [full + noise * torch.randn(1000, generator=generator) for _ in range(40)]
    found = measure(full, draws)
    assert found.variance == pytest.approx(0.25, rel=0.05)
    assert abs(found.bias) < 0.01
    assert found.cosine == pytest.approx(1.25**-0.5, rel=0.02)


def test_the_same_too_short_gradient_every_time_is_bias_alone():
    full = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert measure(full, [full / 2] * 3) == Noise(pytest.approx(0.25), pytest.approx(0), pytest.approx(1))


@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_a_rule_and_its_scores(name):
    assert WAYS[name].selection(0.1).ratio == 0.1
    Seeking(**WAYS[name].seeking)


def test_a_budget_of_the_batch_goes_where_scores_are_large():
    # Ten tokens with a loss in the first example, whose scores are three times as large, and ten in the second.
    scores_BT = torch.tensor([[3.0] * 10 + [0.0] * 2, [1.0] * 10 + [0.0] * 2])
    supervised_BT = scores_BT > 0
    examples = [Example(0, np.arange(10)), Example(1, np.arange(10))]
    rule = WAYS["exact-1-batch"].selection(0.4)
    summed_BT, counts_B = torch.zeros(2, 12), torch.zeros(2)
    for visit in range(400):
        keys_E = torch.tensor([draw_key(number, visit) for number in range(2)])
        positions_BS, weights_BS = select_of_whole_batch(rule, examples, keys_E, None, scores_BT, supervised_BT)
        is_there_BS = positions_BS >= 0
        assert is_there_BS.sum() == 8
        counts_B += is_there_BS.sum(1)
        summed_BT.scatter_add_(1, positions_BS.clamp(min=0), weights_BS * is_there_BS)
    assert counts_B[0] > 2 * counts_B[1]
    # The inverse of the probability of each makes up for it: every loss counts once on the average.
    torch.testing.assert_close(summed_BT[:, :10] / 400, torch.ones(2, 10), atol=0.3, rtol=0)
