"""Layers that carry a state from token to token (linear attention, state-space layers, short convolutions).

What keys and values are to attention, the inputs of the layer's mixer are here: those of unselected tokens are
constants. The mixer itself runs over all tokens, with their activations, since its state passes gradient on from token
to token; norms and feed-forward layers around it run row by row, as in other layers. As there, the untouched code of
the layer runs twice, the selected pass inside the mixer of the unselected one, and the mixer runs once for both.

Shapes: B batch, T tokens, R rows of a pass (S selected, U unselected), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from tokenseek.decoder.find import forward_replaced
from tokenseek.ditching.reach import PlainReach, Reach
from tokenseek.ditching.rows import written
from tokenseek.errors import UserError
from tokenseek.tiling.cache import KeysAndValuesSeen
from tokenseek.tiling.rows import Rows


class MixerSeam:
    """One layer's mixer in the passes of one step, of which it is run in the selected one.

    Args:
        mixer: takes hidden states [B, T, D] first or as ``hidden_states``, and returns [B, T, D], alone or first.

    Attributes:
        recorded_BTD: what the mixer was given in a pass over all tokens before, if there was one.

    Raises:
        UserError: examples are packed, or ranks share texts.
    """

    def __init__(self, mixer: nn.Module, reach: Reach):
        if type(reach) is not PlainReach:
            raise UserError(
                f"{type(mixer).__name__} carries a state from token to token, which would go on from one packed "
                "example to the next, and which ranks that share texts do not hand on. Pad the examples "
                "(training.packing: false), and train without sequence parallelism."
            )
        self.mixer, self.parts = mixer, reach.parts
        self.recorded_BTD: torch.Tensor | None = None
        self.unselected_BUD: torch.Tensor | None = None
        self.output: Any = None  # of all tokens, without a graph

    def in_selected_pass(self) -> AbstractContextManager[None]:
        """The mixer of the selected rows, in a block: it sees all tokens, and gives back the selected ones."""
        return forward_replaced(self.mixer, self._selected)

    def in_unselected_pass(self, run_selected: Callable[[], None], stop: bool) -> AbstractContextManager[None]:
        """The mixer of the unselected rows, in a block: it has `run_selected` run it, and takes its own rows.

        Args:
            stop: raise :class:`KeysAndValuesSeen` instead of going on.
        """
        forward, rows = self.mixer.forward, self.parts.unselected
        assert rows is not None, "there are unselected rows"

        def unselected(*args: Any, **kwargs: Any) -> Any:
            self.unselected_BUD = _hidden(args, kwargs)
            with forward_replaced(self.mixer, forward):
                run_selected()
            if stop:
                raise KeysAndValuesSeen
            return self._rows(rows, self.output)

        return forward_replaced(self.mixer, unselected)

    def _selected(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BSD = _hidden(args, kwargs)
        if self.recorded_BTD is not None:
            whole_BTD = written(self.recorded_BTD[:, None], hidden_BSD[:, None], self.parts.selected)[:, 0]
        else:
            rest = None if self.unselected_BUD is None else self.unselected_BUD[:, None]
            whole_BTD = self.parts.assemble(rest, hidden_BSD[:, None])[:, 0]
        if args:
            args = (whole_BTD, *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": whole_BTD}
        output = type(self.mixer).forward(self.mixer, *args, **kwargs)
        self.output = _detached(output)
        return self._rows(self.parts.selected, output)

    def _rows(self, rows: Rows, output: Any) -> Any:
        """Those rows of the mixer's output, in the form that it has."""
        first = output[0] if isinstance(output, tuple) else output
        if first.dim() != 3 or first.shape[1] != self.parts.tokens:
            raise UserError(
                f"{type(self.mixer).__name__} returns {list(first.shape)} for {self.parts.tokens} tokens; this model "
                "is not supported."
            )
        taken = rows.take(first, 1)
        return (taken, *output[1:]) if isinstance(output, tuple) else taken

    def require_run(self, layer: nn.Module) -> None:
        if self.output is None:
            raise UserError(
                f"{type(layer).__name__} does not run its {type(self.mixer).__name__} over its hidden states; this "
                "model is not supported."
            )


def recording_input(mixer: nn.Module, inputs: list[torch.Tensor]) -> AbstractContextManager[None]:
    """In the block, what the mixer is given is appended to `inputs`."""
    forward = mixer.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        inputs.append(_hidden(args, kwargs).detach())
        return forward(*args, **kwargs)

    return forward_replaced(mixer, noted)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _detached(output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].detach(), *output[1:])
    return output.detach()
