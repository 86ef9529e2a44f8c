"""Bias and variance of gradients of selected tokens, as the benchmark measures them."""

import pytest
import torch

from benchmarks.noise import WAYS, Noise, measure
from tokenseek.ditching import Seeking


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
