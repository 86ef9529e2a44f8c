"""docs/long-context.md: recomputed, r = 0.1 needs no more memory than checkpointing with chunked cross-entropy."""

from __future__ import annotations

import pytest

from tokenseek.config import load_config
from tokenseek.config.resources import list_resources
from tokenseek.planning import Method, plan_memory

QUICK = ("llama-2-7b-qlora",)
# Three presets are made for folders of the user's own.
PRESETS = sorted({*list_resources("preset")} - {"gsm8k", "here", "quickstart"})


@pytest.mark.parametrize("preset", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in PRESETS])
def test_a_tenth_of_the_tokens_recomputed_is_below_checkpointing(preset):
    config = load_config(preset)
    selected = plan_memory(config, Method(0.1, recompute=True))
    checkpointed = plan_memory(config, Method(recompute=True, chunked_loss=True))
    # Full tuning on short examples peaks where gradients are made, with few activations left: there both need the same.
    assert selected.peak < 1.001 * checkpointed.peak, (selected, checkpointed)
    if preset == "llama-2-7b-qlora":
        assert selected.peak <= 4.5 * 2**30, selected
