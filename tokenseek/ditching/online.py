"""Seek and ditch in one step: all tokens run without gradient, then those that matter run with it.

The first pass is the model's own, over all tokens; each layer's keys and values are recorded. It gives the loss of all
tokens and, by what its end says of them, their scores. The second runs the selected rows with gradient, which attend to
the recorded keys and values: Algorithm 1 of the paper, with scores of the present model instead of an index.

Shapes: B batch, T tokens, S selected, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenseek.decoder.attention import without_cudnn
from tokenseek.decoder.find import Decoder
from tokenseek.decoder.head import BodyOutput, is_partitioned
from tokenseek.ditching.batch import Attending, Batch, batch_of
from tokenseek.ditching.exact import ExactTop, exact_top
from tokenseek.ditching.planned import KnownBatch, PlannedRows
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.recorded import Recording
from tokenseek.ditching.seeking import Seeking
from tokenseek.ditching.state import Ditching
from tokenseek.ditching.top import Top
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.seeking.context import attention_received, last_attending
from tokenseek.seeking.gradient import REDUCTIONS, gradient_beyond, gradient_from, head_scores
from tokenseek.selection import SelectionRule
from tokenseek.selection.batched import Selection, select_batch
from tokenseek.ulysses.text import DealtText

# The sum of the losses of all rows of this process, with a graph, from the body's output, hidden states [B, T, D],
# targets [B, T] and, where the host knows it, which of the B x T rows carry a loss.
AllTokensLoss: TypeAlias = Callable[[BodyOutput, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


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
class Seen:
    """What the first pass over all tokens leaves behind.

    Attributes:
        planned: the selected rows, as the host has planned them; None where ranks share the texts or the selection was
            decided beforehand, and where a mask tells packed examples apart.
        loss_sum: of the cross-entropies of all supervised tokens, without a graph.
        supervised: the number of these tokens, at least 1; on the device, for which nobody has to wait.
        exact: with exact layers, what they leave, unless the second pass runs them once more.
    """

    selection: Selection
    planned: PlannedRows | None
    recording: Recording
    loss_sum: torch.Tensor
    supervised: torch.Tensor
    exact: ExactTop | None = None


def see_all_tokens(
    ditching: Ditching,
    arguments: dict[str, Any],
    labels_BT: torch.Tensor,
    rule: SelectionRule,
    selection_keys: torch.Tensor | None,
    all_tokens_loss: AllTokensLoss,
    known: KnownBatch | None,
) -> Seen:
    """The first pass, and the selection by it.

    Args:
        ditching: what the patched modules of the model share.
        arguments: of the model's body, for the whole batch.
        labels_BT: not shifted.
        selection_keys: int64 [E], keys of the examples' draws.
        all_tokens_loss: of the rows of this process, with a graph, for exact layers.
        known: of the batch; the host asks the device for it otherwise.
    """
    seeking = ditching.seeking or Seeking.usual(ditching.decoder, rule)
    seeking.require_servable(ditching.decoder, rule)
    if selection_keys is None:
        raise UserError("selection is given without selection_keys: one int64 for each example, which keys its draws.")
    if ditching.decided is None:
        given = arguments.get("attention_mask"), arguments.get("position_ids")
        known = known or KnownBatch.of(labels_BT, selection_keys, *given, ditching.attention_is_ours)
        known = known.to(labels_BT.device, non_blocking=True)
    batch = batch_of(ditching, arguments, labels_BT, selection_keys, known)
    wanted, is_split = _Wanted.by(rule, seeking), _is_split(ditching)
    recording = _recording(ditching, seeking, wanted, batch, known, is_split)
    scored = _score(ditching, seeking, batch, wanted, recording, is_split, all_tokens_loss)
    if batch.text is not None:
        scored = scored.of_all_ranks(batch.text)
    selection, planned = _select(ditching, batch, rule, scored, known)
    supervised = batch.targets_BT.ne(IGNORED).sum().clamp(min=1)
    return Seen(selection, planned, recording, scored.loss_sum, supervised, scored.exact)


def _select(
    ditching: Ditching, batch: Batch, rule: SelectionRule, scored: _Scored, known: KnownBatch | None
) -> tuple[Selection, PlannedRows | None]:
    """What is selected, and its rows as the host plans them, now that it has waited for the scores."""
    if ditching.decided:
        return ditching.decided.selection, None
    assert known is not None, "only what is decided beforehand needs no batch"
    supervised_BT, device = known.targets_BT.ne(IGNORED), batch.targets_BT.device
    on_host = select_batch(rule, batch.examples, known.keys_E, scored.context_BT, scored.gradient_BT, supervised_BT)
    selection = Selection(*(chosen.to(device, non_blocking=True) for chosen in on_host))
    if batch.text is not None:
        return selection, None
    planned = known.planned(on_host.positions, ditching.attention_is_ours)
    return selection, planned and planned.to(device, non_blocking=True)


class _Scored(NamedTuple):
    """Of all tokens, or of this process's: the sum of their losses, scores that are wanted, and exact layers' loss."""

    loss_sum: torch.Tensor
    context_BT: torch.Tensor | None
    gradient_BT: torch.Tensor | None
    exact: ExactTop | None

    def of_all_ranks(self, text: DealtText) -> _Scored:
        gradient_BT = None if self.gradient_BT is None else text.gathered(self.gradient_BT)
        context_BT = None if self.context_BT is None else text.averaged(self.context_BT)
        dist.all_reduce(self.loss_sum, group=text.group)
        return self._replace(context_BT=context_BT, gradient_BT=gradient_BT)


def _score(
    ditching: Ditching,
    seeking: Seeking,
    batch: Batch,
    wanted: _Wanted,
    recording: Recording,
    is_split: bool,
    all_tokens_loss: AllTokensLoss,
) -> _Scored:
    """Run the pass, whose keys and values go to `recording`."""
    decoder = ditching.decoder
    exact: ExactTop | None = None
    scores_BR: torch.Tensor | None
    attention = batch.attention
    if batch.text is not None:
        attention = partial(cast(Attending, batch.attention), on_keys=recording.see)
    with (
        ditching.recording(recording),
        _graph(decoder, seeking, wanted, recording, is_split) as leaves,
        _attention_watched(decoder, wanted, batch.valid_BT, attention) as received,
    ):
        output = decoder.body(**batch.arguments, use_cache=False, return_dict=True)
        if seeking.exact_layers and recording.top is None:
            with torch.enable_grad():
                loss_sum = all_tokens_loss(output, output.last_hidden_state, batch.own_targets_BR, batch.supervised_R)
            exact, border_gradient_BRD = exact_top(loss_sum, leaves[0], batch.gathered)
            loss_sum, scores_BR = loss_sum.detach().clone(), REDUCTIONS[seeking.reduction](border_gradient_BRD)
        else:
            loss_sum, scores_BR = _head_scores(decoder, seeking, output, batch, wanted, recording, leaves)
    return _Scored(loss_sum, received[0] if received else None, scores_BR, exact)


class _Wanted(NamedTuple):
    """What a rule selects by: attention, the gradient, or the error of the prediction."""

    context: bool
    gradient: bool
    error: bool

    @classmethod
    def by(cls, rule: SelectionRule, seeking: Seeking) -> _Wanted:
        by_gradient = rule.needs_scores and rule.beta != 0
        is_error = seeking.reduction == "error"
        return cls(rule.needs_scores and rule.alpha != 0, by_gradient and not is_error, by_gradient and is_error)


def _is_split(ditching: Ditching) -> bool:
    """Whether ZeRO-3 or FSDP2 deals the weights out."""
    decoder = ditching.decoder
    if ditching.decided:
        return ditching.decided.gathered is not None
    return is_partitioned(decoder.body) or any(isinstance(module, FSDPModule) for module in decoder.body.modules())


def _recording(
    ditching: Ditching, seeking: Seeking, wanted: _Wanted, batch: Batch, known: KnownBatch | None, is_split: bool
) -> Recording:
    """Where the first pass leaves keys and values: of all layers but the exact ones, and with a graph of the scored."""
    decoder, exact = ditching.decoder, seeking.exact_layers
    layers = decoder.layers
    top = None
    if exact and is_split:
        top = Top(decoder, batch.own_targets_BR, batch.gathered)
    scored = seeking.gradient_layer if wanted.gradient else int(wanted.context)
    if exact:
        scored = 0 if top is None else exact
    # Not where it is watched, nor in tiles, in which layers run without a graph.
    as_it_is = is_split or wanted.context or (batch.tiled is not None and not scored and not exact)
    return Recording(
        "host" if ditching.kv_storage in ("host", "int8_host") else "device",
        unrecorded=tuple(layers[-exact:]) if exact else (),
        scored=tuple(layers[-scored:]) if scored else (),
        top=top,
        tiled=batch.tiled,
        watched=last_attending(decoder) if wanted.context else None,
        whole=ditching.decided and ditching.decided.gathered,
        few=None if as_it_is else _few_supervised(decoder, batch, known),
    )


def _few_supervised(decoder: Decoder, batch: Batch, known: KnownBatch | None) -> PlainReach | None:
    """The rows that the last layer runs over where few tokens carry a loss; None where it runs over all.

    So it does over rows that ranks share, where it has no keys and values of its own, and in a plan, in which every
    token carries a loss.
    """
    layer = decoder.layers[-1]
    if known is None or batch.text is not None or layer in decoder.mixers or layer in decoder.sharing:
        return None
    return known.few


@contextmanager
def _graph(
    decoder: Decoder, seeking: Seeking, wanted: _Wanted, recording: Recording, is_split: bool
) -> Iterator[list[torch.Tensor]]:
    """In the block, a pass records a graph of no more than the scores need.

    Yields:
        A list that holds the graph's leaf once it was reached: the input of the lowest exact layer, or the output of
        the last layer. It stays empty where no gradient is taken, and where an engine counts on passes without one.
    """
    if seeking.exact_layers and not is_split:
        with gradient_from(decoder.layers[-seeking.exact_layers]) as leaves:
            yield leaves
    elif wanted.gradient and not is_split:
        with gradient_beyond(decoder.layers[-1]) as leaves:
            yield leaves
    elif wanted.gradient:
        with torch.no_grad(), recording.scoring_beyond_layers(decoder):
            yield []
    else:
        with torch.no_grad():
            yield []


@contextmanager
def _attention_watched(
    decoder: Decoder, wanted: _Wanted, valid_BT: torch.Tensor, attention: Attending | None
) -> Iterator[list[torch.Tensor]]:
    """In the block, attention is that of `attention`, the model's own where None.

    cuDNN's kernels are left out, also where nothing is replaced.

    Yields:
        A list that holds the scores of Eq. 3 once the last layer has run, if they are wanted.
    """
    if wanted.context:
        with attention_received(decoder, valid_BT, attention) as received:
            yield received
    elif attention is not None:
        with attention(lambda original: original):
            yield []
    else:
        with without_cudnn():
            yield []


def _head_scores(
    decoder: Decoder,
    seeking: Seeking,
    output: BodyOutput,
    batch: Batch,
    wanted: _Wanted,
    recording: Recording,
    leaves: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the losses of this process's rows, and their scores by Eq. 4 or by error, if they are wanted."""
    head = head_scores(
        decoder,
        output,
        batch.own_targets_BR,
        batch.supervised_R,
        losses=True,
        errors=wanted.error,
        gradient=wanted.gradient,
    )
    loss_sum = cast(torch.Tensor, head.losses).sum()
    if head.gradient is None:
        return loss_sum, head.errors
    gradient_BTD = head.gradient
    if isinstance(decoder.body, FSDPModule):  # it has let go what is its own, such as the final norm
        decoder.body.unshard()
    if leaves:  # what comes after the layers has a graph of its own
        (gradient_BTD,) = torch.autograd.grad(output.last_hidden_state, leaves[0], gradient_BTD)
    return loss_sum, REDUCTIONS[seeking.reduction](recording.gradient_through_scored(gradient_BTD))
