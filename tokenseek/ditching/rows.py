"""Which rows (tokens) of each example run in which pass.

Shapes: B batch, T tokens, S selected, U unselected, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from tokenseek.errors import UserError
from tokenseek.tiling.rows import Rows, token_buffer


class _Assembled(torch.autograd.Function):
    """Keys or values of all tokens from those of both passes."""

    @staticmethod
    def forward(
        ctx: Any, selected_BNSH: torch.Tensor, unselected_BNUH: torch.Tensor | None, parts: Partition
    ) -> torch.Tensor:
        ctx.rows = parts.selected.alone
        ctx.others = parts.unselected.alone if ctx.needs_input_grad[1] and parts.unselected is not None else None
        # What is not written is read nevertheless, and any NaN in it would reach the gradients.
        every_row_is_given = parts.is_complete and (unselected_BNUH is not None or parts.unselected is None)
        make = torch.Tensor.new_empty if every_row_is_given else torch.Tensor.new_zeros
        buffer = token_buffer(selected_BNSH, parts.tokens, parts.padded, make)
        if unselected_BNUH is not None and parts.unselected is not None:
            parts.unselected.put(buffer, unselected_BNUH)
        parts.selected.put(buffer, selected_BNSH)
        return buffer[:, : parts.tokens].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BNTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        of_others = None if ctx.others is None else ctx.others.gradient_of(gradient_BNTH)
        return ctx.rows.gradient_of(gradient_BNTH), of_others, None


def written(whole_BNTH: torch.Tensor, mine_BNRH: torch.Tensor, rows: Rows) -> torch.Tensor:
    """`whole` with `mine` written into its `rows`, in place; they alone have a gradient."""
    whole_BNTH = _Written.apply(whole_BNTH, mine_BNRH, rows)
    return whole_BNTH


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole_BNTH: torch.Tensor, mine_BNRH: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows.alone
        rows.overwrite(whole_BNTH, mine_BNRH)
        return whole_BNTH.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BNTH: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        return None, ctx.rows.gradient_of(gradient_BNTH), None


@dataclass(frozen=True)
class Partition:
    """The tokens of a batch in two groups: `selected` rows carry gradient, `unselected` rows (None at r = 1) do not.

    Padding tokens are in neither, and cost nothing.

    Attributes:
        right_padded: all padding, if any, is at the end of the examples.
    """

    selected: Rows
    unselected: Rows | None
    tokens: int
    padded: bool
    right_padded: bool

    def assemble(self, unselected_BNUH: torch.Tensor | None, selected_BNSH: torch.Tensor) -> torch.Tensor:
        """Keys or values of all tokens, [B, N, T, H], in the order of the text, from those with a graph and without."""
        whole_BNTH: torch.Tensor = _Assembled.apply(selected_BNSH, unselected_BNUH, self)
        return whole_BNTH

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device; what the host knows is kept."""
        return self._moved(lambda rows: rows.to(device, non_blocking))

    def pin_memory(self) -> Self:
        return self._moved(Rows.pin_memory)

    def _moved(self, move: Callable[[Rows], Rows]) -> Self:
        unselected = None if self.unselected is None else move(self.unselected)
        return replace(self, selected=move(self.selected), unselected=unselected)

    @property
    def ones_BT(self) -> torch.Tensor:
        """int64 [B, T]: a mask of all tokens, padding included."""
        return self.selected.index_BR.new_ones(len(self.selected.index_BR), self.tokens)

    @property
    def is_complete(self) -> bool:
        """Whether every token is in one of the groups."""
        rows = [rows.index_BR.shape[1] for rows in (self.selected, self.unselected) if rows is not None]
        return not self.padded and sum(rows) == self.tokens


def partition(
    selected_positions: torch.Tensor, attention_mask: torch.Tensor | None, tokens: int, recorded: bool = False
) -> Partition:
    """Split the tokens of a batch by `selected_positions` [B, S] (int64, ascending, padded with -1).

    It is made on the host: a dozen sizes are needed there, and what takes dozens of kernels is some arithmetic on a few
    thousand integers. Positions on a device come over in one transfer.

    Args:
        attention_mask: [B, T], 0 at padding; None where there is none.
        tokens: T.
        recorded: the unselected rows have run before; the partition has none.

    Raises:
        UserError: positions that are not as said above, or that point at padding.
    """
    given = f"selected_positions {list(selected_positions.shape)} ({selected_positions.dtype})"
    if selected_positions.dim() != 2 or selected_positions.dtype != torch.int64:
        raise UserError(f"{given}: expected [B, S] int64, each row ascending and padded with -1 at its end.")
    batch, device = len(selected_positions), selected_positions.device
    if attention_mask is not None and attention_mask.shape != (batch, tokens):
        raise UserError(
            f"{given} do not fit attention_mask {list(attention_mask.shape)}: expected [{batch}, {tokens}]."
        )
    if selected_positions.shape[1] == 0:  # nothing selected anywhere: one dropped row keeps the graph alive
        selected_positions = selected_positions.new_full((batch, 1), -1)
    positions_BS, mask_BT = _on_host(selected_positions, attention_mask)
    return _partition(positions_BS, mask_BT, tokens, recorded, given).to(device, non_blocking=True)


def _on_host(positions_BS: torch.Tensor, mask_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    if mask_BT is None or positions_BS.device.type == "cpu":
        return positions_BS.cpu(), None if mask_BT is None else mask_BT.cpu()
    joined = torch.cat([positions_BS, mask_BT.to(positions_BS)], dim=1).cpu()
    return joined[:, : positions_BS.shape[1]].contiguous(), joined[:, positions_BS.shape[1] :]


def is_right_padded(mask_BT: torch.Tensor) -> bool:
    """Whether padding, where the mask is 0, is behind the tokens of every example; the host waits for it."""
    return bool((mask_BT[:, :-1] >= mask_BT[:, 1:]).all())


def _partition(
    positions_BS: torch.Tensor, mask_BT: torch.Tensor | None, tokens: int, recorded: bool, given: str
) -> Partition:
    chosen_BS = positions_BS >= 0
    all_chosen = bool(chosen_BS.all())
    if bool((positions_BS >= tokens).any()):
        raise UserError(f"{given} hold a position outside the {tokens} tokens given.")
    ascending_BS = ((positions_BS.diff(dim=1) > 0) & chosen_BS[:, :-1]) | ~chosen_BS[:, 1:]
    if not (bool(ascending_BS.all()) and bool((positions_BS >= -1).all())):
        raise UserError(f"{given} are not ascending with -1 at the end; sort each row and pad it with -1.")
    is_token_BT = torch.ones(len(positions_BS), tokens, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    right_padded = True
    if mask_BT is not None:
        if not bool((is_token_BT.gather(1, positions_BS.clamp(min=0)) | ~chosen_BS).all()):
            raise UserError(f"{given} point at padding (attention_mask 0); select real tokens only.")
        right_padded = is_right_padded(is_token_BT)

    # What comes behind the last selected token is seen by no selected token.
    is_unselected_BT = is_token_BT & (torch.arange(tokens) < positions_BS.amax(1, keepdim=True))
    if recorded:
        is_unselected_BT[:] = False
    slot_BS = torch.where(chosen_BS, positions_BS, tokens)
    is_unselected_BT = torch.cat([is_unselected_BT, is_unselected_BT.new_zeros(len(positions_BS), 1)], dim=1)
    is_unselected_BT = is_unselected_BT.scatter_(1, slot_BS, False)[:, :tokens]
    unselected_B = is_unselected_BT.sum(1).tolist()

    padded = not (all_chosen and max(unselected_B) == min(unselected_B))
    first_token_B1 = is_token_BT.long().argmax(1, keepdim=True)
    unselected = None
    if max(unselected_B):
        found = is_unselected_BT.nonzero()[:, 1].split(unselected_B)
        positions_BU = pad_sequence(list(found), batch_first=True, padding_value=-1)
        unselected = Rows(positions_BU, first_token_B1, tokens, padded)
    selected = Rows(positions_BS, first_token_B1, tokens, padded)
    _ = selected.on_host  # now that its tensors can be read
    return Partition(selected, unselected, tokens, padded, right_padded)
