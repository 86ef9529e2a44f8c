"""Steps and scores while tools watch the modules from outside: torch's counter of operations, which names them."""

import pytest
from closeness import assert_close
from numerics.test_ditching import gradients, make_batch
from numerics.test_online import DRAWN, KEYS, enabled
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from tokenseek.ditching import Seeking
from tokenseek.seeking.scorer import TokenScorer

WAYS = [Seeking("error"), Seeking("l2"), Seeking("abs", gradient_layer=2), Seeking("l2", exact_layers=1)]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_counted_step_is_the_step(kind, way):
    model, batch = enabled(tiny_model(kind), seeking=way), make_batch()
    expected = gradients(model, model(**batch, selection=DRAWN, selection_keys=KEYS).loss)
    with FlopCounterMode(display=False) as counter:
        actual = gradients(model, model(**batch, selection=DRAWN, selection_keys=KEYS).loss)
    assert_close(actual, expected)
    assert counter.get_total_flops() > 0


def test_counted_scores_are_the_scores():
    model, batch = tiny_model("llama"), make_batch()
    scorer = TokenScorer(model)
    expected = scorer.score(**batch)
    with FlopCounterMode(display=False):
        actual = scorer.score(**batch)
    assert_close(actual._asdict(), expected._asdict())
