"""Which attention kernels may run. The switches exist in builds without CUDA, where a test can look at them."""

from __future__ import annotations

import pytest
import torch
from numerics.test_ditching import SELECTED, make_batch
from tiny_models import tiny_model

import tokenseek
from tokenseek import SelectionRule
from tokenseek.ditching import Seeking
from tokenseek.seeking import TokenScorer


@pytest.fixture
def flags(monkeypatch):
    """Whether cuDNN's kernels were allowed at each call of attention."""
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def spied(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    yield seen
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_attention_of_ditching_runs_by_cudnn(flags, kind, recompute):
    model = tokenseek.enable_token_ditching(tiny_model(kind), recompute=recompute)
    model(**make_batch(), selected_positions=SELECTED).loss.backward()
    assert len(flags) == 4 + 3 + 4 * recompute and not any(flags)


def test_nor_of_packed_examples(flags):
    model = tokenseek.enable_token_ditching(tiny_model("llama"))
    position_ids = torch.cat([torch.arange(7), torch.arange(6)])[None]
    ids = make_batch((13,))["input_ids"]
    model(input_ids=ids, labels=ids, position_ids=position_ids, selected_positions=SELECTED[:1]).loss.backward()
    assert flags and not any(flags)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("alpha,seeking", [(0, Seeking("error")), (0, Seeking("l2")), (0.5, Seeking("l2")),
                                           (0, Seeking("l2", exact_layers=1))])  # fmt: skip
def test_nor_of_steps_that_select(flags, kind, alpha, seeking):
    """In neither pass: the first one's exact layers have a gradient too, and its shapes are as new as the second's."""
    model = tokenseek.enable_token_ditching(tiny_model(kind), seeking=seeking)
    rule = SelectionRule("sampled", 0.5, alpha=alpha, beta=1, explore=0.3)
    model(**make_batch(), selection=rule, selection_keys=torch.arange(2)).loss.backward()
    assert len(flags) >= 4 and not any(flags)


def test_nor_of_seeking(flags):
    TokenScorer(tiny_model("llama")).score(**make_batch())
    assert len(flags) == 4 and not any(flags)


def test_other_forward_passes_are_left_alone(flags):
    tokenseek.enable_token_ditching(tiny_model("llama"))(**make_batch())
    assert flags and all(flags)
