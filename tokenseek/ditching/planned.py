"""What a step has to know of a batch and its selected positions, found on the host before the batch leaves it.

On a GPU, finding it takes dozens of kernels, and the host waits for the device to learn the sizes.

Shapes: B batch, T tokens, E examples, S selected, R supervised rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from tokenseek.decoder.head import next_token_labels
from tokenseek.ditching.packing import reach_on_host
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.rows import is_right_padded, partition
from tokenseek.labels import IGNORED
from tokenseek.selection.batched import Example, examples_of

# Of an example's tokens. Where more carry a loss, a layer on these rows and the others' keys takes as long as on all.
FEW_SUPERVISED = 0.75


@dataclass(frozen=True)
class PlannedRows:
    """What ``selected_positions`` and labels come to; travels with its batch, as a tensor would.

    Attributes:
        reach: of the batch's rows.
        supervised_R: which of the B x S selected rows carry a loss; the first, if none does.
        targets_R: the tokens that these have to predict.
    """

    reach: PlainReach
    supervised_R: torch.Tensor
    targets_R: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, Any], attention_is_ours: bool, recorded: bool = False) -> PlannedRows | None:
        """Of a collator's batch, with ``shift_labels`` [B, S]; None where the model has to see it first.

        Args:
            attention_is_ours, recorded: see :func:`tokenseek.ditching.packing.reach_by_example`.
        """
        positions_BS, mask_BT = batch["selected_positions"], batch.get("attention_mask")
        shape = mask_BT, batch.get("position_ids"), batch["input_ids"].shape[1]
        reach = _reach_of(positions_BS, *shape, attention_is_ours, recorded)
        if reach is None or reach.parts.selected.index_BR.shape != batch["shift_labels"].shape:
            return None
        targets = batch["shift_labels"].masked_fill(~reach.parts.selected.valid_BR, IGNORED).flatten()
        supervised = supervised_rows(targets)
        return cls(reach, supervised, targets[supervised])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        supervised_R, targets_R = (x.to(device, non_blocking=non_blocking) for x in (self.supervised_R, self.targets_R))
        return replace(self, reach=self.reach.to(device, non_blocking), supervised_R=supervised_R, targets_R=targets_R)

    def pin_memory(self) -> Self:
        """The same in memory from which a GPU can be written while the host goes on."""
        supervised_R, targets_R = self.supervised_R.pin_memory(), self.targets_R.pin_memory()
        return replace(self, reach=self.reach.pin_memory(), supervised_R=supervised_R, targets_R=targets_R)


@dataclass(frozen=True)
class KnownBatch:
    """A batch whose tokens its step selects, as the host has it: the step then waits for its scores alone.

    Attributes:
        attention_mask_BT, position_ids_BT: as the model is given them; None where it is not.
        is_right_padded: padding, if any, is behind the tokens.
        examples: of the batch.
        targets_BT: the token that each position predicts; IGNORED at padding.
        keys_E: of the examples' draws.
        supervised_R: which of the B x T positions carry a loss; this and `few` alone move with the batch.
        few: the rows that carry a loss, beside the others; None where most do or none does, or a mask has to tell
            examples apart.
    """

    attention_mask_BT: torch.Tensor | None
    position_ids_BT: torch.Tensor | None
    is_right_padded: bool
    examples: list[Example]
    targets_BT: torch.Tensor
    keys_E: torch.Tensor
    supervised_R: torch.Tensor
    few: PlainReach | None

    @classmethod
    def of(
        cls,
        labels_BT: torch.Tensor,
        keys_E: torch.Tensor,
        attention_mask_BT: torch.Tensor | None,
        position_ids_BT: torch.Tensor | None,
        attention_is_ours: bool,
    ) -> KnownBatch:
        """Of tensors on the host; or of others, for which it waits.

        Args:
            attention_is_ours: see :func:`tokenseek.ditching.packing.reach_by_example`.
        """
        labels_BT, keys_E = labels_BT.cpu(), keys_E.cpu()
        mask_BT = None if attention_mask_BT is None else attention_mask_BT.cpu()
        positions_BT = None if position_ids_BT is None else position_ids_BT.cpu()
        behind = mask_BT is None or is_right_padded(mask_BT)
        examples = examples_of(mask_BT, positions_BT, labels_BT.shape)
        targets_BT = targets_of(labels_BT, mask_BT)
        supervised_R = targets_BT.flatten().ne(IGNORED).nonzero().squeeze(1)
        few = None
        found = [example.nonzero().squeeze(1) for example in targets_BT.ne(IGNORED)]
        if 0 < max(map(len, found)) <= FEW_SUPERVISED * targets_BT.shape[1]:
            few_BS = pad_sequence(found, batch_first=True, padding_value=-1)
            few = _reach_of(few_BS, mask_BT, positions_BT, targets_BT.shape[1], attention_is_ours, recorded=False)
        return cls(mask_BT, positions_BT, behind, examples, targets_BT, keys_E, supervised_R, few)

    def planned(self, positions_BS: torch.Tensor, attention_is_ours: bool) -> PlannedRows | None:
        """The rows at `positions_BS`, which the host has selected; the others have run before."""
        targets_BS = self.targets_BT.gather(1, positions_BS.clamp(min=0)).masked_fill(positions_BS < 0, IGNORED)
        batch = dict(
            input_ids=self.targets_BT,  # of the same shape
            attention_mask=self.attention_mask_BT,
            position_ids=self.position_ids_BT,
            selected_positions=positions_BS,
            shift_labels=targets_BS,
        )
        return PlannedRows.of(batch, attention_is_ours, recorded=True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """For a step on another device."""
        few = self.few and self.few.to(device, non_blocking)
        return replace(self, supervised_R=self.supervised_R.to(device, non_blocking=non_blocking), few=few)

    def pin_memory(self) -> Self:
        """What moves in memory from which a GPU can be written while the host goes on."""
        few = self.few and self.few.pin_memory()
        return replace(self, supervised_R=self.supervised_R.pin_memory(), few=few)


def _reach_of(
    positions_BS: torch.Tensor,
    mask_BT: torch.Tensor | None,
    position_ids_BT: torch.Tensor | None,
    tokens: int,
    attention_is_ours: bool,
    recorded: bool,
) -> PlainReach | None:
    """Of the rows at these positions; None where a mask has to tell examples apart."""
    if mask_BT is None and position_ids_BT is not None:
        return reach_on_host(positions_BS, position_ids_BT, attention_is_ours, recorded)
    return PlainReach(partition(positions_BS, mask_BT, tokens, recorded))


def targets_of(labels_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """[B, T]: the token that each position predicts; padding predicts nothing."""
    targets_BT = next_token_labels(labels_BT)
    return targets_BT if mask_BT is None else targets_BT.masked_fill(~mask_BT.to(targets_BT.device).bool(), IGNORED)


def supervised_rows(targets: torch.Tensor) -> torch.Tensor:
    """[R]: where `targets` is a token; the first place, where it is one nowhere."""
    supervised_R = targets.ne(IGNORED).nonzero().squeeze(1)
    return supervised_R if len(supervised_R) else supervised_R.new_zeros(1)
