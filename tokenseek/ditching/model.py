"""The forward of a model that trains on selected tokens: what is selected, the body's rows, and their loss.

Shapes: B batch, T tokens, S selected, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenseek.decoder.head import BodyOutput, head_logits, next_token_labels
from tokenseek.ditching.body import reach_of
from tokenseek.ditching.embedding import one_gradient_of_tied_weights
from tokenseek.ditching.loss import selected_loss, supervised_loss
from tokenseek.ditching.online import OnlineOutput, Seen, see_all_tokens
from tokenseek.ditching.planned import KnownBatch, PlannedRows
from tokenseek.ditching.reach import Reach
from tokenseek.ditching.state import Ditching, Share, original_forward
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.selection import SelectionRule
from tokenseek.tiling.rows import Rows


@dataclass
class SelectedOutput(CausalLMOutputWithPast):
    """Of selected tokens; who asks for logits that are not there, a loss of a trainer's own, is told why."""

    def __getitem__(self, key: Any) -> Any:
        if key == "logits" and self.logits is None:
            raise UserError(
                "logits of all tokens are asked for, and a model that trains on selected tokens makes none: "
                "label_smoothing_factor and compute_loss_func are incompatible with a selection. Leave them out, or "
                "train on all tokens."
            )
        return super().__getitem__(key)


def make_causal_lm_forward(causal_lm: nn.Module) -> Callable[..., Any]:
    """A forward for a causal LM that also takes what :func:`tokenseek.enable_token_ditching` says."""
    names = list(inspect.signature(causal_lm.forward).parameters)

    def forward(
        self: Any,
        *args: Any,
        selected_positions: torch.Tensor | None = None,
        selected_weights: torch.Tensor | None = None,
        planned_rows: PlannedRows | None = None,
        selection: SelectionRule | None = None,
        selection_keys: torch.Tensor | None = None,
        known_batch: KnownBatch | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        ditching: Ditching = self._token_ditching
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if selection is not None:
            if selected_positions is not None or selected_weights is not None:
                raise UserError(
                    "selection and selected_positions are both given: give a rule, by which the model selects, or "
                    "positions that were selected before."
                )
            labels = arguments.pop("labels", labels)
            asked = selection, selection_keys, known_batch
            online = _online_forward(ditching, arguments, *asked, labels, num_items_in_batch)
            return online.to_tuple() if arguments.get("return_dict") is False else online
        has_labels = any(given is not None for given in (labels, shift_labels, arguments.get("labels")))
        if selected_positions is None and planned_rows is None and not (ditching.sequence and has_labels):
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return original_forward(self)(*args, **kwargs)
        labels = arguments.pop("labels", labels)
        return_dict = arguments.pop("return_dict", None)
        arguments.pop("logits_to_keep", None)
        selected = _Selected(
            selected_positions, selected_weights, planned_rows, labels, shift_labels, num_items_in_batch
        )
        output = _selected_forward(ditching, arguments, selected)
        return output.to_tuple() if return_dict is False else output

    _sign(forward, causal_lm)
    return forward


def _sign(forward: Any, causal_lm: nn.Module) -> None:
    """Trainers read the signature to learn which columns the model takes and whether it normalises its loss itself."""
    parameters = list(inspect.signature(type(causal_lm).forward).parameters.values())
    selected = "selected_positions", "selected_weights", "planned_rows"
    selecting = "selection", "selection_keys", "known_batch"
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in (*selected, *selecting)]
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = inspect.Signature([*parameters[:at], *added, *parameters[at:]])


class _Selected(NamedTuple):
    """What a call says of selected tokens, as :func:`tokenseek.enable_token_ditching` describes it."""

    positions: torch.Tensor | None
    weights: torch.Tensor | None
    planned: PlannedRows | None
    labels: torch.Tensor | None
    shift_labels: torch.Tensor | None
    num_items: torch.Tensor | int | None

    @property
    def has_labels(self) -> bool:
        return self.labels is not None or self.shift_labels is not None


def _selected_forward(ditching: Ditching, arguments: dict[str, Any], selected: _Selected) -> SelectedOutput:
    """The loss of the selected rows; without labels their logits [B, S, V]."""
    decoder = ditching.decoder
    share, num_items = _share_of(ditching, arguments, selected)
    with one_gradient_of_tied_weights(decoder), ditching.handing(share.reach):
        body_output = decoder.body(**share.arguments)
    hidden_BSD = body_output.last_hidden_state
    if not selected.has_labels:
        logits = head_logits(decoder, body_output, hidden_BSD.flatten(0, 1))
        return SelectedOutput(logits=logits.view(*hidden_BSD.shape[:2], -1))
    recompute, weights_BS = ditching.recomputes(decoder.layers[-1]), share.weights_BS
    if share.labels_BS is not None:
        loss = selected_loss(decoder, body_output, hidden_BSD, share.labels_BS, num_items, recompute, weights_BS)
    else:
        assert selected.planned is not None, "labels are given, or planned for"
        rows = selected.planned.supervised_R, selected.planned.targets_R  # which the host knows
        loss = supervised_loss(decoder, body_output, hidden_BSD, *rows, num_items, recompute, weights_BS)
    return SelectedOutput(loss=ditching.sequence.total(loss) if ditching.sequence else loss)


def _share_of(
    ditching: Ditching, arguments: dict[str, Any], selected: _Selected
) -> tuple[Share, torch.Tensor | int | None]:
    """The rows of this process, and what the sum of the losses is divided by; labels are left out where planned."""
    sequence, positions, num_items = ditching.sequence, selected.positions, selected.num_items
    if sequence is None and selected.planned is not None:
        return Share(arguments, selected.planned.reach, None, selected.weights), num_items
    if sequence is not None:
        positions = sequence.agreed_positions(arguments, positions, selected.labels, selected.shift_labels)
    reach = reach_of(ditching, arguments, positions)
    labels_BS = None
    if selected.has_labels:
        labels_BS = _labels_of(reach.parts.selected, selected.labels, selected.shift_labels)
    if sequence is None:
        return Share(arguments, reach, labels_BS, selected.weights), num_items
    assert labels_BS is not None, "without labels, `agreed_positions` has raised"
    if num_items is None:
        counts_BS = labels_BS.ne(IGNORED)
        num_items = (counts_BS if selected.weights is None else counts_BS * selected.weights).sum()
    return sequence.share(ditching.decoder, arguments, reach.parts, labels_BS, selected.weights), num_items


def _online_forward(
    ditching: Ditching,
    arguments: dict[str, Any],
    rule: SelectionRule,
    selection_keys: torch.Tensor | None,
    known: KnownBatch | None,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> OnlineOutput:
    """Both passes of :mod:`tokenseek.ditching.online`, and the loss of the selected rows."""
    if labels is None:
        raise UserError(
            "selection is given without labels, which decide what the tokens are scored by. A trainer's "
            "label_smoothing_factor and compute_loss_func take the labels away: leave them out."
        )
    decoder, recompute = ditching.decoder, ditching.recomputes(ditching.decoder.layers[-1])
    arguments = {name: value for name, value in arguments.items() if name not in ("return_dict", "logits_to_keep")}

    def all_tokens_loss(
        body_output: BodyOutput, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor, supervised_R: torch.Tensor | None
    ) -> torch.Tensor:
        if supervised_R is None or not len(supervised_R):
            return selected_loss(decoder, body_output, hidden_BTD, targets_BT, 1, recompute)
        targets_R = targets_BT.flatten().index_select(0, supervised_R)
        return supervised_loss(decoder, body_output, hidden_BTD, supervised_R, targets_R, 1, recompute)

    seen = see_all_tokens(ditching, arguments, labels, rule, selection_keys, all_tokens_loss, known)
    share = _share_of_seen(ditching, arguments, seen, labels)
    asked_BS, weights_BS = cast(torch.Tensor, share.labels_BS), share.weights_BS
    if seen.recording.top is not None:
        seen.recording.top.selected = asked_BS, cast(torch.Tensor, weights_BS)
        asked_BS, weights_BS = seen.recording.top.targets_BT, None
    with one_gradient_of_tied_weights(decoder), ditching.replaying(seen.recording), ditching.handing(share.reach):
        body_output = decoder.body(**share.arguments)
    num_items = seen.supervised if num_items_in_batch is None else num_items_in_batch
    if seen.exact:
        border_BSD = cast(torch.Tensor, seen.recording.border)
        loss = seen.exact.loss(border_BSD, asked_BS, cast(torch.Tensor, weights_BS)) / num_items
    elif seen.planned and seen.recording.top is None:
        rows, hidden_BSD = (seen.planned.supervised_R, seen.planned.targets_R), body_output.last_hidden_state
        loss = supervised_loss(decoder, body_output, hidden_BSD, *rows, num_items, recompute, weights_BS)
    else:
        hidden_BSD = body_output.last_hidden_state
        loss = selected_loss(decoder, body_output, hidden_BSD, asked_BS, num_items, recompute, weights_BS)
    return OnlineOutput(
        loss=ditching.sequence.total(loss) if ditching.sequence else loss,
        loss_all=seen.loss_sum / seen.supervised,
        selected_positions=seen.selection.positions,
        selected_weights=seen.selection.weights,
    )


def _share_of_seen(ditching: Ditching, arguments: dict[str, Any], seen: Seen, labels: torch.Tensor) -> Share:
    """The second pass's rows on this process, with what the loss asks of each.

    That is its target or, at the border of exact layers, its position; IGNORED where a slot is empty. Targets of
    planned rows are left out.
    """
    reach: Reach
    if ditching.decided:
        reach = ditching.decided.reach
    elif seen.planned:
        reach = seen.planned.reach
    else:
        reach = reach_of(ditching, arguments, seen.selection.positions, recorded=True)
    rows, weights_BS = reach.parts.selected, seen.selection.weights
    by_position = seen.exact is not None or seen.recording.top is not None
    asked_BS: torch.Tensor | None = None
    if by_position:
        asked_BS = rows.index_BR.masked_fill(~rows.valid_BR, IGNORED)
    elif not seen.planned:
        asked_BS = _labels_of(rows, labels, None)
    if ditching.sequence is None:
        return Share(arguments, reach, asked_BS, weights_BS)
    assert asked_BS is not None, "rows that ranks share are not planned"
    return ditching.sequence.share(ditching.decoder, arguments, reach.parts, asked_BS, weights_BS)


def _labels_of(rows: Rows, labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """[B, S]: the token that each selected row has to predict. `shift_labels` may be [B, T] or already [B, S]."""
    if shift_labels is None:
        shift_labels = next_token_labels(cast(torch.Tensor, labels))
    if shift_labels.shape != rows.index_BR.shape:
        shift_labels = rows.take(shift_labels, 1)
    return shift_labels.masked_fill(~rows.valid_BR, IGNORED)
