"""The forward of a model that trains on selected tokens: what is selected, the body's rows, and their loss.

Shapes: B batch, T tokens, S selected, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenseek.decoder.head import BodyOutput, head_logits, next_token_labels
from tokenseek.ditching.body import reach_of
from tokenseek.ditching.embedding import one_gradient_of_tied_weights
from tokenseek.ditching.loss import selected_loss, supervised_loss
from tokenseek.ditching.online import OnlineOutput, see_all_tokens
from tokenseek.ditching.planned import PlannedRows
from tokenseek.ditching.rows import Rows
from tokenseek.ditching.state import Ditching, original_forward
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.selection import SelectionRule


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
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        ditching: Ditching = self._token_ditching
        decoder, sequence = ditching.decoder, ditching.sequence
        arguments = dict(zip(names, args, strict=False)) | kwargs
        has_labels = any(given is not None for given in (labels, shift_labels, arguments.get("labels")))
        if selection is not None:
            if selected_positions is not None or selected_weights is not None:
                raise UserError(
                    "selection and selected_positions are both given: give a rule, by which the model selects, or "
                    "positions that were selected before."
                )
            labels = arguments.pop("labels", labels)
            if labels is None:
                raise UserError(
                    "selection is given without labels, which decide what the tokens are scored by. A trainer's "
                    "label_smoothing_factor and compute_loss_func take the labels away: leave them out."
                )
            output = _online_forward(ditching, arguments, selection, selection_keys, labels, num_items_in_batch)
            return output.to_tuple() if arguments.get("return_dict") is False else output
        if selected_positions is None and planned_rows is None and not (sequence and has_labels):
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return original_forward(self)(*args, **kwargs)
        labels = arguments.pop("labels", labels)
        return_dict = arguments.pop("return_dict", None)
        arguments.pop("logits_to_keep", None)
        if sequence:
            selected_positions = sequence.agreed_positions(arguments, selected_positions, labels, shift_labels)
        planned = None if sequence else planned_rows
        reach = planned.reach if planned else reach_of(ditching, arguments, selected_positions)
        labels_BS = None
        if has_labels and not planned:
            labels_BS = _labels_of(reach.parts.selected, labels, shift_labels)
        if sequence:
            labels_BS = cast(torch.Tensor, labels_BS)  # without labels, `agreed_positions` has raised
            if num_items_in_batch is None:
                counts_BS = labels_BS.ne(IGNORED)
                num_items_in_batch = (counts_BS if selected_weights is None else counts_BS * selected_weights).sum()
            arguments, reach, labels_BS, selected_weights = sequence.share(
                decoder, arguments, reach.parts, labels_BS, selected_weights
            )
        with one_gradient_of_tied_weights(decoder), ditching.handing(reach):
            body_output = decoder.body(**arguments)
        hidden_BSD = body_output.last_hidden_state

        loss = logits = None
        if has_labels:
            options: Any = dict(recompute=ditching.recomputes(decoder.layers[-1]), weights_BS=selected_weights)
            given: Any = (decoder, body_output, hidden_BSD)
            if planned:  # rows that the host knows
                rows = planned.supervised_R, planned.targets_R
                loss = supervised_loss(*given, *rows, num_items_in_batch, **options)
            else:
                loss = selected_loss(*given, labels_BS, num_items_in_batch, **options)
            loss = sequence.total(loss) if sequence else loss
        else:
            logits = head_logits(decoder, body_output, hidden_BSD.flatten(0, 1))
            logits = logits.view(*hidden_BSD.shape[:2], -1)
        output = SelectedOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    # Trainers read the signature to learn which columns the model takes and whether it normalises its loss itself.
    parameters = list(inspect.signature(type(causal_lm).forward).parameters.values())
    names_added = ("selected_positions", "selected_weights", "planned_rows", "selection", "selection_keys")
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names_added]
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    signed: Any = forward
    signed.__signature__ = inspect.Signature([*parameters[:at], *added, *parameters[at:]])
    return signed


def _online_forward(
    ditching: Ditching,
    arguments: dict,
    rule: SelectionRule,
    selection_keys: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> OnlineOutput:
    """Both passes of :mod:`tokenseek.ditching.online`, and the loss of the selected rows."""
    decoder, recompute = ditching.decoder, ditching.recomputes(ditching.decoder.layers[-1])
    arguments = {name: value for name, value in arguments.items() if name not in ("return_dict", "logits_to_keep")}
    sequence = ditching.sequence

    def all_tokens_loss(body_output: BodyOutput, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return selected_loss(decoder, body_output, hidden_BTD, targets_BT, 1, recompute)

    seen = see_all_tokens(ditching, arguments, labels, rule, selection_keys, all_tokens_loss)
    if ditching.decided:
        reach = ditching.decided.reach
    else:
        reach = reach_of(ditching, arguments, seen.selection.positions, recorded=True)
    rows, weights_BS = reach.parts.selected, seen.selection.weights
    top = seen.recording.top
    # What the loss asks of a selected row: its target or, at the border of exact layers, its position.
    by_position = seen.exact or top
    asked_BS = rows.index_BR.masked_fill(~rows.valid_BR, IGNORED) if by_position else _labels_of(rows, labels, None)
    if sequence:
        arguments, reach, asked_BS, weights_BS = sequence.share(decoder, arguments, reach.parts, asked_BS, weights_BS)
    if top is not None:
        top.selected = asked_BS, weights_BS
        asked_BS, weights_BS = top.targets_BT, None
    with one_gradient_of_tied_weights(decoder), ditching.replaying(seen.recording), ditching.handing(reach):
        body_output = decoder.body(**arguments)
    if num_items_in_batch is None:
        num_items_in_batch = seen.supervised
    if seen.exact:
        loss = seen.exact.loss(seen.recording.border, asked_BS, weights_BS) / num_items_in_batch
    else:
        loss = selected_loss(
            decoder,
            body_output,
            body_output.last_hidden_state,
            asked_BS,
            num_items_in_batch,
            recompute,
            weights_BS,
        )
    return OnlineOutput(
        loss=sequence.total(loss) if sequence else loss,
        loss_all=seen.loss_sum / seen.supervised,
        selected_positions=seen.selection.positions,
        selected_weights=seen.selection.weights,
    )


def _labels_of(rows: Rows, labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """[B, S]: the token that each selected row has to predict. `shift_labels` may be [B, T] or already [B, S]."""
    if shift_labels is None:
        shift_labels = next_token_labels(cast(torch.Tensor, labels))
    if shift_labels.shape != rows.index_BR.shape:
        shift_labels = rows.take(shift_labels, 1)
    return shift_labels.masked_fill(~rows.valid_BR, IGNORED)
