"""Keys and values of unselected rows that are not kept for the backward pass: they are projected again.

What entered their layer is kept instead, where that is fewer bytes: so it is where query heads do not share them.

Shapes: B batch, U unselected, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from tokenseek.ditching.autocast import autocast_cache
from tokenseek.ditching.storage import Board, Kept, _report


class ProjectedAgain:
    """Hidden states in the place of keys and values, for one layer of one step.

    Args:
        project: from what enters the layer to the keys and values of these rows, without gradient.
        hidden_BUD: what enters the layer; read once more in the backward pass, if kept.
        storage: where it waits, "device" or "host".
        board: of the layer.

    Attributes:
        is_used: hidden states are kept, and must not be written over.
    """

    def __init__(
        self,
        project: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        hidden_BUD: torch.Tensor,
        storage: str,
        board: Board,
    ):
        self.project, self.storage, self._board = project, storage, board
        self._hidden: torch.Tensor | None = hidden_BUD
        self._random_state = torch.get_rng_state(), *get_device_states(hidden_BUD)
        self._given: tuple[torch.Tensor, ...] | None = None
        self.is_used = False

    def keep_instead_of(self, keys_and_values: tuple[torch.Tensor, ...], share: float = 1) -> bool:
        """Whether hidden states are kept, which :meth:`take` then makes keys and values of.

        Args:
            share: of keys and values that would be kept.
        """
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "asked once"
        self.is_used = hidden.nbytes < share * sum(rows.nbytes for rows in keys_and_values)
        if self.is_used:
            self._kept, self._given = Kept(hidden, self.storage, self._board), keys_and_values
            if self.storage == "device":
                _report("hidden", hidden)
        return self.is_used

    def take(self) -> tuple[torch.Tensor, ...]:
        """The keys and values: as given the first time, projected again from then on."""
        given, self._given = self._given, None
        if given is not None:
            return given
        with torch.no_grad(), autocast_cache(False), self._same_random_numbers():
            return self.project(self._kept.restore())

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """Dropout in the block drops what it did when the layer ran."""
        cpu_state, devices, states = self._random_state
        device_type = self._kept.device.type
        with torch.random.fork_rng(devices=devices, device_type=device_type if devices else "cuda"):
            torch.set_rng_state(cpu_state)
            if devices:
                set_device_states(devices, states, device_type=device_type)
            yield
