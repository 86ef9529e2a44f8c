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
    **kwargs,
) -> torch.Tensor:
    """Loss whose gradient is Algorithm 1's; arguments as the patched model takes them."""
    decoder = find_decoder(model)
    keep = torch.zeros(input_ids.shape[0], input_ids.shape[1] + 1, dtype=torch.bool)
    keep.scatter_(1, selected_positions.where(selected_positions >= 0, input_ids.shape[1]), True)
    keep = keep[:, :-1]

    def inject(layer, args, kwargs):
        names = [decoder.cache_argument]
        if decoder.cache_argument in kwargs or len(args) < 2:
            return args, kwargs | {names[0]: _DetachingCache(keep)}
        return (args[0], _DetachingCache(keep), *args[2:]), kwargs  # GPT-2 passes the cache second, by position

    def cut(layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(keep[..., None], hidden, hidden.detach())
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [layer.register_forward_pre_hook(inject, with_kwargs=True) for layer in decoder.layers]
    hooks += [layer.register_forward_hook(cut) for layer in decoder.layers]
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits
    finally:
        for hook in hooks:
            hook.remove()
    targets = torch.where(keep[:, :-1], labels[:, 1:], -100)
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    total = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / count
