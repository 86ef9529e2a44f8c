"""Both importance scores of a batch, from one forward pass and the backward pass of its last layers.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from tokenseek.decoder.find import find_decoder, keep_4bit_differentiable
from tokenseek.decoder.head import next_token_labels
from tokenseek.decoder.masks import makes_masks_by_utils, whole_masks
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.seeking.context import attention_received, last_attending
from tokenseek.seeking.gradient import REDUCTIONS, gradient_from, head_scores, loss_gradient
from tokenseek.tiling.tiles import require_tile_rows
from tokenseek.tiling.whole import PlainText, layers_in_tiles, tiled_pass
from tokenseek.tiling.window import Replaced, with_windows
from tokenseek.ulysses.agreement import require_same
from tokenseek.ulysses.heads import require_shareable
from tokenseek.ulysses.text import DealtText, TextInTiles

LOSS_SCOPES = ("response", "sequence")


class Scores(NamedTuple):
    """Importance of every token, 0 at padding.

    Attributes:
        context: I1 of Eq. 3, float32 [B, T]; adds up to the number of tokens, less what attention sinks take.
        gradient: I2 of Eq. 4, float32 [B, T].
    """

    context: torch.Tensor
    gradient: torch.Tensor


class Prepared(NamedTuple):
    """A batch, with what the host has to know of it before the model sees it.

    Attributes:
        input_ids, attention_mask, labels, targets: int64 [B, T]; `labels` are -100 at padding, `targets` shifted.
        supervised_B: how many positions of each example carry a loss.
        supervised_R: which of the B x T positions these are.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    supervised_B: torch.Tensor
    supervised_R: torch.Tensor

    def to(self, device: torch.device) -> Prepared:
        """The same on a device; a copy to a GPU does not wait."""
        if device.type == "cuda" and self.input_ids.device.type == "cpu":  # copied while the host continues
            return Prepared(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))
        return Prepared(*(tensor.to(device) for tensor in self))


class TokenScorer:
    """Scores tokens with a Transformers causal language model, in any precision, plain or wrapped by PEFT.

    The model is used as it is and left as it was: only during scoring is dropout off and needs no parameter a gradient.
    Its 4-bit weights, if any, are kept from being repacked (`tokenseek.decoder.find.keep_4bit_differentiable`).

    Args:
        model: see `tokenseek.decoder.find.find_decoder` for what is accepted.
        gradient_layer: k takes the gradient at the input of layer N-k+1 of N; 1 is the last layer (Eq. 4, Table S14).
        reduction: of the gradient's D entries: "abs" sums magnitudes, "signed" the entries, "l2" is their norm.
        loss_scope: "response" trusts the labels; "sequence" takes every token as its own label.
        tile_rows: how many rows go through a layer at once where no gradient is taken, as in
            :func:`tokenseek.enable_token_ditching`.
        group: ranks that score the same batches together, each computing a part of the tokens and of the heads, for
            examples too long for one; every rank is given whole batches and gets whole scores.

    Example:
        >>> scorer = TokenScorer(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
        >>> context, gradient = scorer.score(input_ids, attention_mask, labels)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gradient_layer: int = 1,
        reduction: str = "abs",
        loss_scope: str = "response",
        tile_rows: int | str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.decoder, self.group = model, find_decoder(model), group
        if group is not None:
            require_shareable(self.decoder, group)
        if not 1 <= gradient_layer <= len(self.decoder.layers):
            raise UserError(
                f"gradient_layer is {gradient_layer}; it counts layers from the end, from 1 (the last) to "
                f"{len(self.decoder.layers)} (the first of {self.decoder.name})."
            )
        if reduction not in REDUCTIONS:
            raise UserError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")
        if loss_scope not in LOSS_SCOPES:
            raise UserError(f"loss_scope is {loss_scope!r}; it must be one of {', '.join(LOSS_SCOPES)}.")
        require_tile_rows(tile_rows)
        self.gradient_layer, self.reduction, self.loss_scope = gradient_layer, reduction, loss_scope
        self.tile_rows = tile_rows
        keep_4bit_differentiable(model)

    @property
    def device(self) -> torch.device:
        """Where `score` takes its tensors: the device of the embeddings."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's weights."""
        return self.decoder.causal_lm.dtype

    def score(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Scores:
        """Scores of a right-padded batch.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 1 at tokens, 0 at the padding on their right.
            labels: int64 [B, T], -100 or the token itself, not shifted. An example without any has gradient scores 0.

        Raises:
            UserError: padding that is not on the right; a model that computes attention in code of its own, or whose
                layers pass on several hidden states per token; on all ranks of a group, other batches on some.
        """
        return self.run(self.prepare(input_ids, attention_mask, labels))

    def prepare(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Prepared:
        """The first half of :meth:`score`: of a batch on the host, nothing waits for the device.

        Raises:
            UserError: padding that is not on the right.
        """
        valid = attention_mask.bool()
        if (valid[:, 1:] > valid[:, :-1]).any():
            raise UserError("attention_mask has padding before or between tokens; pad on the right to score.")
        labels = (input_ids if self.loss_scope == "sequence" else labels).masked_fill(~valid, IGNORED)
        targets = next_token_labels(labels)
        is_supervised = targets.ne(IGNORED)
        supervised_R = is_supervised.flatten().nonzero().squeeze(1)
        batch = Prepared(input_ids, attention_mask, labels, targets, is_supervised.sum(1), supervised_R)
        return batch.to(self.device)

    def run(self, batch: Prepared) -> Scores:
        """The second half of :meth:`score`, for which the host waits nowhere, unless ranks share the batch."""
        input_ids, attention_mask, labels, targets, supervised, _ = batch
        own_R: torch.Tensor | None = batch.supervised_R
        valid = attention_mask.bool()
        text: DealtText | None = None
        replaced: Replaced | None = None
        # Causal attention never looks at padding on the right: without a mask, kernels for plain causality apply.
        arguments = dict(input_ids=input_ids)
        masks: AbstractContextManager[None] = nullcontext()
        plain = PlainText((len(input_ids), input_ids.shape[1]))
        if self.group is None and makes_masks_by_utils(self.decoder):
            # Without one, Transformers would look for packed examples, for which the host waits for the device.
            arguments["attention_mask"] = torch.ones_like(input_ids)
            if tiled_pass(self.decoder, plain, self.tile_rows):
                replaced = with_windows(self.decoder, input_ids.shape[1])
            if replaced is None:
                masks = whole_masks(self.decoder, input_ids.shape[1], None, None)
        if self.group is not None:
            require_same(self.group, input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            text = DealtText(self.decoder, self.group, input_ids)
            arguments, targets, replaced = text.arguments(), text.mine(targets, IGNORED), text.attention
            own_R = None
        layer = self.decoder.layers[-self.gradient_layer]
        own_text = plain if text is None else TextInTiles(text, plain)
        with (
            masks,
            _frozen(self.model),
            layers_in_tiles(self.decoder, own_text, self.tile_rows, whole=[last_attending(self.decoder)]),
            gradient_from(layer) as leaves,
            attention_received(self.decoder, valid, replaced) as received,
        ):
            output = self.decoder.body(**arguments, use_cache=False, return_dict=True)
            if leaves[0].shape[:-1] != targets.shape:
                raise UserError(
                    f"The layers of {self.decoder.name} pass on hidden states of shape {tuple(leaves[0].shape)} for "
                    f"{tuple(targets.shape)} tokens: several per token, of which Eq. 4 knows nothing. Use a model "
                    "whose layers pass on one, [B, T, D]."
                )
            scores = head_scores(self.decoder, output, targets, own_R, gradient=True)
            head_gradient = cast(torch.Tensor, scores.gradient)
            gradient = REDUCTIONS[self.reduction](loss_gradient(output, leaves[0], head_gradient, supervised))
        context = received[0]
        if text is not None:
            context, gradient = text.averaged(context), text.gathered(gradient)
        return Scores(context.float(), gradient.masked_fill(~valid, 0).float())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter that needs a gradient; both restored, module by module."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
