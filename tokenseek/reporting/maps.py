"""What the two scores are sums of: the attention map and the gradient map of one example.

Shapes: T tokens, D hidden, N heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tokenseek.decoder.find import find_decoder
from tokenseek.errors import UserError


@dataclass(frozen=True)
class TokenMaps:
    """The maps behind Eq. 3 and 4 for one example, in float32.

    Attributes:
        attention: [T, T], of the last layer, averaged over its heads; row i is where token i looks.
        gradient: [T, D], magnitudes of the loss's gradient at the input of the last layer.
        by_layer: [3, T], the gradient scores at the inputs of layers N-1, N-2 and N-3 (Table S14).
    """

    attention: np.ndarray
    gradient: np.ndarray
    by_layer: np.ndarray

    @property
    def context(self) -> np.ndarray:
        """[T]: Eq. 3, the sums of the attention map's columns."""
        return self.attention.sum(0)


def token_maps(model: PreTrainedModel, input_ids: Sequence[int], labels: Sequence[int]) -> TokenMaps:
    """The maps of one example. They take T x T floats; scoring itself never builds them.

    Args:
        model: with at least three layers and ``attn_implementation="eager"``, which alone gives attention maps.

    Raises:
        UserError: a model that is not so, or an example without any label.
    """
    decoder = find_decoder(model)
    if decoder.causal_lm.config.get_text_config()._attn_implementation != "eager":
        raise UserError("attention maps need a model loaded with attn_implementation='eager'.")
    if len(decoder.layers) < 3:
        raise UserError(f"{decoder.name} has {len(decoder.layers)} layers; the maps need three.")
    if all(label == -100 for label in labels[1:]):
        raise UserError("this example has no token with a loss, so it has no gradients to show.")
    ids, targets = torch.tensor([list(input_ids)]), torch.tensor([list(labels)])
    inputs: list[torch.Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not inputs:  # the first of the three: nothing below it is differentiated
            hidden = hidden.detach().requires_grad_()
        hidden.retain_grad()
        inputs.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder.layers[-3:]]
    try:
        model.eval().requires_grad_(False)
        output = model(
            input_ids=ids.to(decoder.device), labels=targets.to(decoder.device), output_attentions=True, use_cache=False
        )
        output.loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_()
    by_input = [cast(torch.Tensor, hidden.grad) for hidden in reversed(inputs)]
    gradients = [gradient[0].abs().float().cpu().numpy() for gradient in by_input]
    return TokenMaps(
        attention=output.attentions[-1][0].detach().float().mean(0).cpu().numpy(),
        gradient=gradients[0],
        by_layer=np.stack([gradient.sum(1) for gradient in gradients]),
    )
