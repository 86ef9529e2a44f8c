"""Algorithm 1 the plain way, as the truth to compare with: an ordinary forward pass over all tokens, in which the keys,
the values and the layer outputs of unselected tokens are detached. It stores everything and shares no code with the
seam.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import Cache, PreTrainedModel

from tokenseek.decoder.find import find_decoder


class _DetachingCache(Cache):
    def __init__(self, keep_BT: torch.Tensor):
        self.keep = keep_BT[:, None, :, None]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return torch.where(self.keep, keys, keys.detach()), torch.where(self.keep, values, values.detach())


def dense_loss(
    model: PreTrainedModel,
    input_ids,
    labels,
    selected_positions,
    attention_mask=None,
    num_items_in_batch=None,
    selected_weights=None,
    exact_layers=0,
    **kwargs,
) -> torch.Tensor:
    """Loss whose gradient is Algorithm 1's; arguments as the patched model takes them.

    In layers that carry a state, the inputs of unselected tokens to what carries it are detached, and its outputs.

    Args:
        exact_layers: so many top layers see all tokens with gradient; below, a selected row's gradient is that of the
            loss at its output into them, times its weight.
    """
    decoder = find_decoder(model)
    places = selected_positions.where(selected_positions >= 0, input_ids.shape[1])
    keep = torch.zeros(input_ids.shape[0], input_ids.shape[1] + 1, dtype=torch.bool).scatter_(1, places, True)[:, :-1]
    if selected_weights is None:
        selected_weights = torch.ones(places.shape)
    weights = torch.zeros(input_ids.shape[0], input_ids.shape[1] + 1, dtype=torch.float64)
    weights = weights.scatter_(1, places, selected_weights.double())[:, :-1]
    cut_layers = decoder.layers[: len(decoder.layers) - exact_layers]

    def inject(layer, args, kwargs):
        names = [decoder.cache_argument]
        if decoder.cache_argument in kwargs or len(args) < 2:
            return args, kwargs | {names[0]: _DetachingCache(keep)}
        return (args[0], _DetachingCache(keep), *args[2:]), kwargs  # GPT-2 passes the cache second, by position

    def cut(layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(keep[..., None], hidden, hidden.detach())
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    border = []

    def open_border(layer, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        border.extend([hidden, hidden.detach().requires_grad_()])
        return ((border[1], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": border[1]})

    def cut_input(mixer, args, kwargs):
        hidden = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": torch.where(keep[..., None], hidden, hidden.detach())}

    mixers = [decoder.mixers[layer] for layer in cut_layers if layer in decoder.mixers]
    attending = [layer for layer in cut_layers if layer not in decoder.mixers]
    hooks = [layer.register_forward_pre_hook(inject, with_kwargs=True) for layer in attending]
    hooks += [mixer.register_forward_pre_hook(cut_input, with_kwargs=True) for mixer in mixers]
    hooks += [layer.register_forward_hook(cut) for layer in cut_layers]
    if exact_layers:
        first_exact = decoder.layers[len(cut_layers)]
        hooks.append(first_exact.register_forward_pre_hook(open_border, with_kwargs=True))
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits
    finally:
        for hook in hooks:
            hook.remove()
    targets = labels[:, 1:] if exact_layers else torch.where(keep[:, :-1], labels[:, 1:], -100)
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    if not exact_layers:
        return (losses * weights[:, :-1].flatten()).sum() / count
    total = losses.sum()
    (gradient,) = torch.autograd.grad(total, border[1], retain_graph=True)
    below = (gradient * weights[..., None] * border[0]).sum()
    return (total + below - below.detach()) / count
