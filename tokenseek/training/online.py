"""What a run knows of the tokens that its steps have selected themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator

from tokenseek.decoder.head import next_token_labels
from tokenseek.ditching.online import OnlineOutput
from tokenseek.labels import IGNORED


class OnlineTotals:
    """Sums over the steps since the last log, and over the run, without waiting for the device.

    Attributes:
        tokens, selected, supervised: of this process, over the run: tokens, selected ones, and those of them that
            carry a loss.
    """

    def __init__(self) -> None:
        self.tokens: torch.Tensor | int = 0
        self.selected: torch.Tensor | int = 0
        self.supervised: torch.Tensor | int = 0
        self._recent: torch.Tensor | None = None

    def add(self, inputs: Mapping[str, Any], output: OnlineOutput) -> None:
        """Count a micro batch."""
        targets_BT = next_token_labels(inputs["labels"])
        with_loss_BT = targets_BT.ne(IGNORED)
        positions_BS, loss_all = cast(torch.Tensor, output.selected_positions), cast(torch.Tensor, output.loss_all)
        is_selected_BS = positions_BS >= 0
        mask = inputs.get("attention_mask")
        self.tokens = self.tokens + (targets_BT.numel() if mask is None else mask.sum())
        self.selected = self.selected + is_selected_BS.sum()
        chosen_BS = with_loss_BT.gather(1, positions_BS.clamp(min=0)) & is_selected_BS
        self.supervised = self.supervised + chosen_BS.sum()
        count = with_loss_BT.sum()
        recent = torch.stack([loss_all.double() * count, count.double()]).to(torch.float32)
        self._recent = recent if self._recent is None else self._recent + recent

    def loss_all(self, accelerator: Accelerator) -> float | None:
        """Mean loss of all supervised tokens since the last call, over all processes; None before the first step."""
        if self._recent is None:
            return None
        total, count = accelerator.reduce(self._recent, reduction="sum").tolist()
        self._recent = None
        return float(total / max(1.0, count))
