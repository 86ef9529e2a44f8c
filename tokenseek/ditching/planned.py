"""What a step has to know of a batch's selected positions, found on the host before the batch leaves it.

On a GPU, finding it takes dozens of kernels, and the host waits for the device to learn the sizes.

Shapes: B batch, T tokens, S selected, R supervised rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import Self

from tokenseek.ditching.packing import reach_on_host
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.rows import partition
from tokenseek.labels import IGNORED


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
    def of(cls, batch: dict[str, Any], attention_is_ours: bool) -> PlannedRows | None:
        """Of a collator's batch, with ``shift_labels`` [B, S]; None where the model has to see it first.

        Args:
            attention_is_ours: see :func:`tokenseek.ditching.packing.reach_by_example`.
        """
        positions_BS, mask_BT = batch["selected_positions"], batch.get("attention_mask")
        if mask_BT is None and batch.get("position_ids") is not None:
            reach = reach_on_host(positions_BS, batch["position_ids"], attention_is_ours)
        else:
            reach = PlainReach(partition(positions_BS, mask_BT, batch["input_ids"].shape[1]))
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


def supervised_rows(targets: torch.Tensor) -> torch.Tensor:
    """[R]: where `targets` is a token; the first place, where it is one nowhere."""
    supervised_R = targets.ne(IGNORED).nonzero().squeeze(1)
    return supervised_R if len(supervised_R) else supervised_R.new_zeros(1)
