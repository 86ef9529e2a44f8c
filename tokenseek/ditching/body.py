"""The forward of a model's body with selected tokens: it makes the masks, and its layers run on two groups of rows.

Shapes: B batch, T tokens, S selected, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from tokenseek.decoder.names import CACHE_ARGUMENTS, OUTPUTS_OF_ALL_TOKENS, without_checkpointing
from tokenseek.ditching.packing import reach_by_example
from tokenseek.ditching.reach import PlainReach, Reach
from tokenseek.ditching.rows import partition
from tokenseek.ditching.state import Ditching, Step, argument_names, original_forward
from tokenseek.errors import UserError


def reach_of(
    ditching: Ditching, arguments: dict[str, Any], selected_positions: torch.Tensor | None, recorded: bool = False
) -> Reach:
    """How the rows at `selected_positions` [B, S], and those that they attend to, reach attention in a batch.

    Args:
        arguments: of the model's body.
        recorded: the unselected rows have run before.
    """
    if ditching.handed is not None:
        return ditching.handed
    if selected_positions is None:
        raise UserError("selected_positions are not given: pass int64 [B, S], or call the model without selection.")
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    selected_positions = selected_positions.to(tokens.device)
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is None and position_ids is not None and not ditching.sequence:
        return reach_by_example(
            ditching.decoder, selected_positions, position_ids, ditching.attention_is_ours, recorded
        )
    return PlainReach(partition(selected_positions, mask, tokens.shape[1], recorded))


def _require_loss_of_model(kwargs: dict[str, Any]) -> None:
    """Refuse what only the causal LM reads, which most models' bodies would ignore and train on something else."""
    for name in ("selection", "selected_weights"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"{name} came to the model's body, past the causal LM, which weighs and selects: a trainer computes "
                "the loss itself. In a subclass of TRL's SFTTrainer set compute_loss = "
                "transformers.Trainer.compute_loss (docs/trainers.md), or use a TokenSeekTrainer."
            )


def body_forward(self: Any, *args: Any, selected_positions: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """The body's output with hidden states of the selected rows, [B, S, D]; of all rows, [B, T, D], without them."""
    ditching: Ditching = self._token_ditching
    _require_loss_of_model(kwargs)
    if selected_positions is None and ditching.handed is None:
        return original_forward(self)(*args, **kwargs)
    arguments = dict(zip(argument_names(self), args, strict=False)) | kwargs
    for name in (*CACHE_ARGUMENTS, *OUTPUTS_OF_ALL_TOKENS):
        if arguments.pop(name, None) or getattr(self.config, name, None):
            raise UserError(f"{name} is incompatible with selected_positions: leave it out, in the config too.")
    arguments["use_cache"] = False
    if ditching.handed is None and ditching.sequence:
        raise UserError("under sequence parallelism call the causal LM with labels: hidden states stay apart.")
    reach = reach_of(ditching, arguments, selected_positions)
    arguments, masks = reach.body_call(ditching.decoder, arguments)

    layers = ditching.decoder.layers
    ditching.step = Step(reach, {layer for layer in layers if ditching.recomputes(layer)}, ditching.recorded)
    try:
        # Until 5.22, Transformers recomputes a layer from outside its forward.
        with masks, without_checkpointing(self, *layers):
            output = original_forward(self)(**{name: value for name, value in arguments.items() if value is not None})
    finally:
        ditching.step = None
    if ditching.recorded is not None and ditching.recorded.top is not None:
        return output  # of all rows
    rows = reach.parts.selected
    if ditching.returns_all_rows:
        output.last_hidden_state = rows.take(output.last_hidden_state, 1)
    if (shape := output.last_hidden_state.shape[:2]) != rows.index_BR.shape:
        raise UserError(
            f"{ditching.decoder.name} returned hidden states of {list(shape)} rows for {list(rows.index_BR.shape)} "
            "selected ones: it changes the token axis after its layers; this model is not supported."
        )
    return output
