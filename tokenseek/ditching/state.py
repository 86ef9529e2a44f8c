"""What token ditching leaves on a model, and the one way to it.

Shapes: B batch, T tokens, S selected, U unselected, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn

from tokenseek.decoder.attention import has_attention_interface
from tokenseek.decoder.find import Decoder, find_decoder, unwrapped
from tokenseek.decoder.names import checkpoints, without_checkpointing
from tokenseek.ditching.autocast import autocast_cache
from tokenseek.ditching.reach import Reach
from tokenseek.ditching.recorded import Gathered, Recording
from tokenseek.ditching.rows import Partition
from tokenseek.ditching.seeking import Seeking
from tokenseek.ditching.storage import Shelf
from tokenseek.errors import UserError
from tokenseek.selection.batched import Selection


class Share(NamedTuple):
    """What one process runs of a batch.

    Attributes:
        arguments: of the model's body.
        reach: of its rows.
        labels_BS, weights_BS: of the losses of its selected rows, where there are any.
    """

    arguments: dict[str, Any]
    reach: Reach
    labels_BS: torch.Tensor | None
    weights_BS: torch.Tensor | None


class Sharing(Protocol):
    """What token ditching asks where several processes share each text (:mod:`tokenseek.parallel`)."""

    group: dist.ProcessGroup

    def require_same(self, **inputs: torch.Tensor | None) -> None:
        """Raise UserError in all processes unless all were given the same inputs."""

    def agreed_positions(
        self,
        arguments: dict[str, Any],
        selected_positions: torch.Tensor | None,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Positions [B, S], all tokens where None, after making sure that all processes were given the same."""

    def share(
        self,
        decoder: Decoder,
        arguments: dict[str, Any],
        parts: Partition,
        labels_BS: torch.Tensor,
        weights_BS: torch.Tensor | None,
    ) -> Share:
        """This process's share of the rows of `parts`, whose labels and weights are given."""

    def total(self, loss: torch.Tensor) -> torch.Tensor:
        """The sum of every process's part of the loss."""


class Decided(NamedTuple):
    """What a step selects, decided before it runs: in a plan, whose tensors hold no scores.

    Attributes:
        gathered: where an engine is planned to split the weights; None where they are whole.
    """

    selection: Selection
    reach: Reach
    gathered: Gathered | None


class Ditching:
    """What the patched modules of one model share; `step` is set while a forward pass with selected tokens runs."""

    def __init__(
        self, decoder: Decoder, recompute: bool, kv_storage: str, tile_rows: int | str, seeking: Seeking | None
    ) -> None:
        self.decoder = decoder
        self.recompute = recompute
        self.kv_storage = kv_storage
        self.tile_rows = tile_rows
        self.seeking = seeking
        self.step: Step | None = None
        # Keys and values of all tokens: set while they are recorded, and while the selected rows attend to them.
        self.recorder: Recording | None = None
        self.recorded: Recording | None = None
        # Set where ranks share a text (`tokenseek.parallel`).
        self.sequence: Sharing | None = None
        # Made before the modules that use it are called, see `handing`.
        self.handed: Reach | None = None
        # Set while a step that selects its own tokens is planned (`tokenseek.planning`).
        self.decided: Decided | None = None
        self.returns_all_rows = _returns_all_rows(decoder.body)
        self.has_interface = has_attention_interface(decoder)

    def recomputes(self, layer: nn.Module) -> bool:
        """Whether the selected rows of a layer run once more in the backward pass, now that it is asked."""
        return self.recompute or checkpoints(layer)

    @contextmanager
    def recording(self, recording: Recording) -> Iterator[None]:
        """In the block, layers run over all tokens and leave their keys and values in `recording`."""
        self.recorder = recording
        try:
            with autocast_cache(False), without_checkpointing(self.decoder.body, *self.decoder.layers):
                yield
        finally:
            self.recorder = None

    @contextmanager
    def replaying(self, recording: Recording) -> Iterator[None]:
        """In the block, selected rows attend to the keys and values of `recording`."""
        self.recorded = recording
        try:
            yield
        finally:
            self.recorded = None

    @contextmanager
    def handing(self, reach: Reach) -> Iterator[None]:
        """In the block, a call makes no partition of its positions but takes that of `reach`.

        The model hands it to its body so. A caller does where positions cannot be read (fake tensors).
        """
        before, self.handed = self.handed, reach
        try:
            yield
        finally:
            self.handed = before

    @property
    def attention_is_ours(self) -> bool:
        """Whether the model looks its attention function up, and finds one of ours: its backend is sdpa."""
        return self.has_interface and self.decoder.causal_lm.config.get_text_config()._attn_implementation == "sdpa"


class Step:
    """One forward pass: how its rows reach attention and, between layers, the unselected rows.

    Where these have run before, their keys and values are in `recording`.
    """

    def __init__(self, reach: Reach, recomputed: set[nn.Module], recording: Recording | None) -> None:
        self.reach = reach
        # Layers whose selected rows run once more in the backward pass.
        self.recomputed = recomputed
        self.recording = recording
        self.unselected_BUD: torch.Tensor | None = None
        # Keys and values of layers below, with the selected rows' gradient, for layers that take them over.
        self.shared: dict[str, Any] = {}
        self.started = False
        # What waits for the backward pass.
        self.shelf = Shelf()


def ditching_of(model: nn.Module) -> Ditching | None:
    """What :func:`tokenseek.enable_token_ditching` left on a model, wrapped or not; None where it is not enabled."""
    return getattr(unwrapped(model), "_token_ditching", None)


def require_ditching(model: nn.Module) -> Ditching:
    """:func:`ditching_of` a model on which token ditching is enabled.

    Raises:
        UserError: it is not.
    """
    ditching = ditching_of(model)
    if ditching is None:
        raise UserError(
            f"token ditching is not enabled on this {find_decoder(model).name}: call enable_token_ditching."
        )
    return ditching


def original_forward(module: Any) -> Callable[..., Any]:
    """The forward that a patched module had before."""
    return module._forward_before_ditching or MethodType(module.__class__.forward, module)


def argument_names(module: Any) -> list[str]:
    """Names of the arguments of a module's forward, as its class has it, without `self`."""
    return _names_of_arguments(module.__class__.forward)


@cache
def _names_of_arguments(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _returns_all_rows(body: nn.Module) -> bool:
    """Whether the body has to be handed all T rows after its last layer, to give the selected ones back.

    Old decoders give their output the shape of their input ids by a view, which only all rows fit. Where there is no
    source to see that in, all rows are right for every decoder, if not the cheapest for most.
    """
    try:
        return "view(output_shape)" in inspect.getsource(inspect.unwrap(type(body).forward))
    except (OSError, TypeError):
        return True
