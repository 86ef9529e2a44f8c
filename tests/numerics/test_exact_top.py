"""Head and top layers that are exact: gone through once, and their weights' gradients handed out once."""

import shutil

import pytest
import torch
from closeness import assert_close
from numerics.test_ditching import gradients, make_batch
from numerics.test_online import DRAWN, KEYS, enabled
from tiny_models import tiny_model

from benchmarks.memory import SavedActivations
from tokenseek.ditching import Seeking
from tokenseek.ditching.exact import exact_top
from tokenseek.models.kernels import compile_regions
from tokenseek.planning.work import Work

# Logits of more than one chunk (tokenseek/decoder/head.py), so that they are not kept.
WIDE = {"vocab_size": 40_000, "tie_word_embeddings": True}


def step(model, batch, **given):
    return model(**batch, selection=DRAWN, selection_keys=KEYS[: len(batch["input_ids"])], **given)


def operations(exact_layers, **options):
    model = enabled(tiny_model("llama", **WIDE), seeking=Seeking("l2", exact_layers=exact_layers), **options)
    with Work() as work:
        step(model, make_batch((460, 460))).loss.backward()
    return work.flops


@pytest.mark.parametrize("recompute", [False, True])
def test_a_head_that_is_trained_is_gone_through_once(recompute):
    """Scores by the gradient take its logits of all tokens and their gradient; its weight's is all that is added."""
    head = 2 * 32 * WIDE["vocab_size"] * (460 - 1 - 3) * 2  # of one product over the tokens that carry a loss
    exact, scored = operations(1, recompute=recompute), operations(0, recompute=recompute)
    assert 2.9 * head < exact < 3.4 * head
    assert exact < scored + 1.1 * head


def test_activations_above_the_border_are_gone_when_selected_rows_run():
    def kept(exact_layers):
        model = enabled(tiny_model("llama"), seeking=Seeking("l2", exact_layers=exact_layers))
        with SavedActivations(model) as saved:
            step(model, make_batch((300, 300)))
        return saved.bytes

    assert kept(1) < kept(0)  # the layer's selected rows, at the least, are not kept


def test_hooks_on_weights_run_once_with_the_loss():
    model, batch = enabled(tiny_model("llama"), seeking=Seeking("l2", exact_layers=1)), make_batch()
    expected = gradients(model, step(model, batch).loss)
    seen = []
    weights = model.lm_head.weight, model.model.layers[-1].mlp.up_proj.weight, model.model.norm.weight
    hooks = [weight.register_hook(lambda gradient: seen.append(1) or gradient / 2) for weight in weights]
    loss = step(model, batch).loss
    assert not seen
    actual = gradients(model, loss)
    assert len(seen) == len(weights)
    for name, parameter in model.named_parameters():
        is_halved = any(parameter is weight for weight in weights)
        assert torch.equal(actual[name], expected[name] / 2 if is_halved else expected[name]), name
    for hook in hooks:
        hook.remove()
    again = gradients(model, step(model, batch).loss)
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())


def test_a_loss_is_gone_through_once():
    model = enabled(tiny_model("llama"), seeking=Seeking("l2", exact_layers=1))
    loss = step(model, make_batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes through one backward pass"):
        loss.backward()


def test_gradients_in_shared_memory_are_handed_out_one_by_one():
    border, first, second = (torch.ones(1, 3, 2, requires_grad=True) for _ in range(3))
    third, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = (border * 3 + (first + second) + third.expand(3, 2)).sum() + 0 * unused.sum()
    exact, gradient = exact_top(loss, border, None)
    assert torch.equal(gradient, torch.full((1, 3, 2), 3.0)) and exact.gradient_BTD is gradient
    (exact.loss_sum * 2).backward()
    for leaf in (first, second):
        assert torch.equal(leaf.grad, torch.full((1, 3, 2), 2.0))
    assert torch.equal(third.grad, torch.full((2,), 6.0)) and not unused.grad.any() and border.grad is None


def test_weights_above_the_border_may_all_be_frozen():
    model = tiny_model("llama")
    for module in (model.lm_head, model.model.norm, model.model.layers[-1]):
        module.requires_grad_(False)
    enabled(model, seeking=Seeking("l2", exact_layers=1))
    output = step(model, make_batch())
    output.loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()
    assert output.loss_all.item() > 0 and model.lm_head.weight.grad is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_may_be_exact():
    """What torch.compile makes may go through one backward pass alone: it writes over what it keeps."""
    model, batch = enabled(tiny_model("llama"), seeking=Seeking("l2", exact_layers=1)), make_batch()
    expected = gradients(model, step(model, batch).loss)
    torch._dynamo.reset()  # what other tests have compiled counts towards its limit
    compiled = tiny_model("llama")
    compile_regions(compiled, backend="inductor")
    enabled(compiled, seeking=Seeking("l2", exact_layers=1))
    assert_close(gradients(compiled, step(compiled, batch).loss), expected)
