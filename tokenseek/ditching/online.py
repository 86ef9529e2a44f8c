"""Seek and ditch in one step: all tokens run without gradient, then those that matter run with it.

The first pass is the model's own, over all tokens; each layer's keys and values are recorded. It gives the loss of all
tokens and, by what its end says of them, their scores. The second runs the selected rows with gradient, which attend to
the recorded keys and values: Algorithm 1 of the paper, with scores of the present model instead of an index.

Shapes: B batch, T tokens, S selected, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenseek.decoder.attention import attention_replaced
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.head import at_least_float32, next_token_labels
from tokenseek.decoder.masks import whole_masks
from tokenseek.ditching.packing import every_example_alone
from tokenseek.ditching.recorded import Recording
from tokenseek.ditching.zero3 import is_partitioned
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.seeking.context import attention_received
from tokenseek.seeking.gradient import REDUCTIONS, gradient_beyond, gradient_from, head_scores
from tokenseek.selection import SelectionRule
from tokenseek.selection.batched import Example, Selection, examples_of, select_batch
from tokenseek.ulysses.text import DealtText

ONLINE_REDUCTIONS = (*REDUCTIONS, "error")


@dataclass(frozen=True)
class Seeking:
    """How tokens are scored inside a training step.

    Args:
        reduction: of Eq. 4's gradient, "abs", "signed" or "l2"; or "error", the norm of p - y (predicted probabilities
            less the target), which the forward pass alone gives.
        gradient_layer: the gradient is taken at the input of layer N-k+1 of N.
        exact_layers: so many top layers and the head are trained on all tokens; below them, selected rows are seeded
            with their gradient over their probability.

    Raises:
        UserError: a value that is not accepted, by name.
    """

    reduction: str = "abs"
    gradient_layer: int = 1
    exact_layers: int = 0

    def __post_init__(self):
        if self.reduction not in ONLINE_REDUCTIONS:
            raise UserError(f"reduction is {self.reduction!r}; it must be one of {', '.join(ONLINE_REDUCTIONS)}.")
        if self.gradient_layer < 1:
            raise UserError(f"gradient_layer is {self.gradient_layer}; it counts layers from the end, from 1.")
        if self.exact_layers < 0:
            raise UserError(
                f"exact_layers is {self.exact_layers}; it must be 0 or the number of layers to train whole."
            )
        if self.exact_layers and self.reduction == "error":
            raise UserError("reduction 'error' knows no gradient, which exact_layers selects by; use 'l2' or 'abs'.")

    def require_servable(self, decoder: Decoder, rule: SelectionRule) -> None:
        """Raise UserError for a model with fewer layers, or exact layers under a rule without weights."""
        layers = max(self.gradient_layer, self.exact_layers)
        if layers > len(decoder.layers):
            name = "gradient_layer" if self.gradient_layer == layers else "exact_layers"
            raise UserError(f"{name} is {layers}, and {decoder.name} has {len(decoder.layers)} layers.")
        if self.exact_layers and not (rule.has_weights and rule.needs_scores and rule.alpha == 0):
            raise UserError(
                f"exact_layers is {self.exact_layers} with rule {rule.rule!r} (alpha {rule.alpha:g}): the rows "
                "below are drawn by their gradient and weighted, so use rule='sampled' with alpha=0 and beta=1."
            )


@dataclass
class OnlineOutput(CausalLMOutputWithPast):
    """What a model returns that selects its tokens itself.

    Attributes:
        loss: of the selected tokens, weighted; with exact layers that of all tokens.
        loss_all: mean cross-entropy of all supervised tokens, without gradient.
        selected_positions: int64 [B, S], -1 where an example has no further one.
        selected_weights: float32 [B, S].
    """

    loss_all: torch.Tensor | None = None
    selected_positions: torch.Tensor | None = None
    selected_weights: torch.Tensor | None = None


@dataclass
class ExactTop:
    """Head and top layers that have run over all tokens with gradient.

    Attributes:
        loss_sum: of the cross-entropies of all supervised tokens; where ranks share a text, of this rank's. It has a
            graph down to the border, the input of the lowest exact layer.
        gradient: [B, T, D] of the sum over all ranks with respect to the border, of all tokens.
    """

    loss_sum: torch.Tensor
    gradient: torch.Tensor

    def loss(self, selected_BSD: torch.Tensor, positions_BS: torch.Tensor, weights_BS: torch.Tensor) -> torch.Tensor:
        """`loss_sum`, whose gradient reaches the weights below the border too: there it is the estimate.

        Args:
            selected_BSD: the selected rows of this process at the border.
            positions_BS: theirs in the text, negative where a slot is empty.
            weights_BS: one over the probability of each.
        """
        index_BSD = positions_BS.clamp(min=0)[..., None].expand(*positions_BS.shape, self.gradient.shape[-1])
        weights_BS = weights_BS.masked_fill(positions_BS < 0, 0)
        seeds_BSD = at_least_float32(self.gradient.gather(1, index_BSD)) * weights_BS[..., None]
        surrogate = (seeds_BSD * at_least_float32(selected_BSD)).sum()
        return self.loss_sum + (surrogate - surrogate.detach())


@dataclass
class Seen:
    """What the first pass over all tokens leaves behind.

    Attributes:
        loss_sum: of the cross-entropies of all supervised tokens, without a graph.
        supervised: the number of these tokens, at least 1; on the device, for which nobody has to wait.
        exact: with exact layers, what they leave.
    """

    selection: Selection
    recording: Recording
    loss_sum: torch.Tensor
    supervised: torch.Tensor
    exact: ExactTop | None = None


def see_all_tokens(
    ditching,
    arguments: dict,
    labels_BT: torch.Tensor,
    rule: SelectionRule,
    selection_keys: torch.Tensor,
    all_tokens_loss: Callable[..., torch.Tensor],
) -> Seen:
    """The first pass, and the selection by it.

    Args:
        ditching: what the patched modules of the model share (:class:`tokenseek.ditching.patch.Ditching`).
        arguments: of the model's body, for the whole batch.
        labels_BT: not shifted.
        selection_keys: int64 [E], keys of the examples' draws.
        all_tokens_loss: sum of the losses of all rows of this process, with a graph, for exact layers: of body output,
            hidden states [B, T, D] and targets [B, T].
    """
    decoder, seeking = ditching.decoder, ditching.seeking
    seeking.require_servable(decoder, rule)
    if selection_keys is None:
        raise UserError("selection is given without selection_keys: one int64 for each example, which keys its draws.")
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    targets_BT = next_token_labels(labels_BT)
    if mask is not None:
        targets_BT = targets_BT.masked_fill(~mask.to(targets_BT.device).bool(), IGNORED)
    examples = examples_of(mask, position_ids, targets_BT.shape)
    supervised_BT = targets_BT.ne(IGNORED)
    is_split = is_partitioned(decoder.body) or any(isinstance(module, FSDPModule) for module in decoder.body.modules())
    if _tail_is_a_unit(decoder):
        raise UserError(
            "this FSDP2 launch shards the final norm together with the head (accelerate does), which cannot run twice "
            "before the backward pass. Select from an index (scoring.mode: index), or launch with DDP or ZeRO-2."
        )
    if seeking.exact_layers and is_split:
        raise UserError(
            "exact_layers is incompatible with ZeRO-3 and FSDP2, which let a layer's weights go between its two "
            "backward passes; set it to 0, or train with DDP, ZeRO-1 or ZeRO-2."
        )
    text = _dealt(ditching, arguments, labels_BT, selection_keys) if ditching.sequence else None

    by_context = rule.needs_scores and rule.alpha != 0
    by_gradient = rule.needs_scores and rule.beta != 0 and seeking.reduction != "error"
    by_error = rule.needs_scores and rule.beta != 0 and seeking.reduction == "error"
    exact = seeking.exact_layers
    scored = 0 if exact else seeking.gradient_layer if by_gradient else int(by_context)
    unrecorded = tuple(decoder.layers[-exact:]) if exact else ()
    storage = "host" if ditching.kv_storage == "host" else "device"
    scored_layers = tuple(decoder.layers[-scored:]) if scored else ()
    recording = Recording(storage, unrecorded, scored_layers, text and text.share_keys)
    with ditching.recording(recording), ExitStack() as stack:
        if exact:
            leaves = stack.enter_context(gradient_from(decoder.layers[-exact]))
        elif by_gradient and not is_split:
            leaves = stack.enter_context(gradient_beyond(decoder.layers[-1]))
        else:
            stack.enter_context(torch.no_grad())
            leaves = []
            if by_gradient:
                stack.enter_context(recording.scoring_beyond_layers(decoder))
        if text is None:
            attention = _attention_of(ditching, examples, len(targets_BT), mask)
        else:
            attention = partial(text.attention, keys_are_shared=True)
        received = None
        if by_context:
            valid_BT = torch.ones_like(supervised_BT) if mask is None else mask.bool()
            received = stack.enter_context(attention_received(decoder, valid_BT, attention))
        elif attention is not None:
            stack.enter_context(attention(lambda original: original))
        if text is None:
            arguments = _all_rows_arguments(arguments, mask, position_ids)
        else:
            arguments = text.arguments(arguments["input_ids"])
        output = decoder.body(**arguments, use_cache=False, return_dict=True)
        own_targets = targets_BT if text is None else text.mine(targets_BT, IGNORED)
        exact_top = None
        if exact:
            with torch.enable_grad():
                own_sum = all_tokens_loss(output, output.last_hidden_state, own_targets)
                (gradient_BTD,) = torch.autograd.grad(own_sum, leaves[0], retain_graph=True)
            loss_sum, scores_BT = own_sum.detach().clone(), REDUCTIONS[seeking.reduction](gradient_BTD)
            exact_top = ExactTop(own_sum, gradient_BTD if text is None else text.gathered(gradient_BTD))
        else:
            asked = dict(losses=True, errors=by_error, gradient=by_gradient, chunks=ditching.even_chunks)
            head = head_scores(decoder, output, own_targets, **asked)
            loss_sum, scores_BT = head.losses.sum(), head.errors
            if by_gradient:
                gradient_BTD = head.gradient
                if isinstance(decoder.body, FSDPModule):  # it has let go what is its own, such as the final norm
                    decoder.body.unshard()
                if leaves:  # what comes after the layers has a graph of its own
                    (gradient_BTD,) = torch.autograd.grad(output.last_hidden_state, leaves[0], gradient_BTD)
                scores_BT = REDUCTIONS[seeking.reduction](recording.gradient_through_scored(gradient_BTD))
    context_BT = received and received[0]
    if text is not None:
        scores_BT = None if scores_BT is None else text.gathered(scores_BT)
        context_BT = None if context_BT is None else text.averaged(context_BT)
        dist.all_reduce(loss_sum, group=text.group)
    selection = select_batch(rule, examples, selection_keys, context_BT, scores_BT, supervised_BT)
    return Seen(selection, recording, loss_sum, supervised_BT.sum().clamp(min=1), exact_top)


def _tail_is_a_unit(decoder: Decoder) -> bool:
    """Whether a module behind the layers is an FSDP2 unit of its own, or with the head."""
    embeddings = decoder.causal_lm.get_input_embeddings()
    return any(isinstance(m, FSDPModule) for m in decoder.body.children() if m is not embeddings)


def _attention_of(ditching, examples: list[Example], batch: int, mask):
    """What attention is replaced by in the first pass: examples of a packed row attend alone. None: the model's own."""
    if mask is not None or len(examples) == batch or batch > 1 or not ditching.attention_is_ours:
        return None
    lengths = [len(example.positions) for example in examples]
    decoder = ditching.decoder

    @contextmanager
    def replaced(replace) -> Iterator[None]:
        alone = every_example_alone(lengths)
        with (
            whole_masks(decoder, max(lengths), None, None),
            attention_replaced(decoder.causal_lm, lambda original: replace(alone(original))),
        ):
            yield

    return replaced


def _all_rows_arguments(arguments: dict, mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> dict:
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if mask is not None and position_ids is None and bool((mask[:, :-1] >= mask[:, 1:]).all()):
        # No token looks at padding behind it: causality is all the mask that is needed.
        arguments.pop("attention_mask")
    return {name: value for name, value in arguments.items() if name not in ("use_cache", "return_dict")}


def _dealt(ditching, arguments: dict, labels_BT: torch.Tensor, selection_keys: torch.Tensor) -> DealtText:
    """The batch, of which each rank of the group runs some tokens in the first pass.

    Raises:
        UserError: on all ranks, for what cannot be dealt, or if they were given different batches.
    """
    input_ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if input_ids is None or arguments.get("position_ids") is not None:
        raise UserError(
            "selection under sequence parallelism needs input_ids and no position_ids: pad the examples "
            "(training.packing: false) instead of packing them."
        )
    if mask is not None and not bool((mask[:, :-1] >= mask[:, 1:]).all()):
        raise UserError("selection under sequence parallelism needs padding on the right.")
    given = dict(input_ids=input_ids, attention_mask=mask, labels=labels_BT, selection_keys=selection_keys)
    return DealtText(ditching.decoder, ditching.sequence.group, **given)
