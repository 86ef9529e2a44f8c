"""Sequence parallelism in a plan: the step of one rank, whose exchanges have their sizes and no partner."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from tokenseek.decoder.find import Decoder, find_decoder
from tokenseek.ditching.rows import Partition
from tokenseek.ditching.state import require_ditching
from tokenseek.ditching.tiles import tiles_of
from tokenseek.parallel import enable_sequence_parallelism
from tokenseek.parallel.sequence import SequenceParallelism
from tokenseek.parallel.sharding import LocalPartition, SharedReach, shard
from tokenseek.ulysses.heads import query_heads
from tokenseek.ulysses.layout import LAYOUTS


def plan_as_first_rank(model: nn.Module, ranks: int, layout: str, text: Partition, recomputed: bool) -> None:
    """Let `model` take its steps as rank 0 of `ranks` that share each text.

    Args:
        layout: as for :func:`tokenseek.parallel.enable_sequence_parallelism`.
        text: the partition of the text that it will be called with, once. Who holds which rows is settled here, on
            real positions, since sizes depend on it.
        recomputed: the step recomputes activations.

    Raises:
        UserError: the ranks cannot share this model's attention.
    """
    group = _group_without_others(ranks)
    enable_sequence_parallelism(model, group, layout=layout)
    dealt = shard(text, group, query_heads(find_decoder(model)), LAYOUTS[layout], {})
    ditching = require_ditching(model)
    tiles_of(SharedReach(dealt), ditching.tile_rows, recomputed)
    ditching.sequence = _FirstRank(group, layout, dealt)


class _FirstRank(SequenceParallelism):
    def __init__(self, group: dist.ProcessGroup, layout: str, dealt: LocalPartition) -> None:
        super().__init__(group, layout, engine="averages")
        self._dealt = [dealt]

    def require_same(self, **inputs: torch.Tensor | None) -> None:
        """There is no other rank to compare with."""

    def agreed_positions(
        self,
        arguments: dict[str, Any],
        selected_positions: torch.Tensor | None,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        return cast(torch.Tensor, selected_positions)

    def shard(self, decoder: Decoder, arguments: dict[str, Any], parts: Partition) -> LocalPartition:
        return self._dealt.pop()  # its masks live as long as the forward pass, as in a real step


def _group_without_others(ranks: int) -> dist.ProcessGroup:
    """Rank 0 of a group that torch does not list, so that it neither needs a default group nor disturbs one."""
    # Torch's backend for dry runs: collectives return at once and leave their buffers as they are.
    from torch._C._distributed_c10d import FakeProcessGroup  # late: not every build of torch has it

    make = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)  # older releases of torch call the class
    make_group: Any = dist.ProcessGroup  # whose stub knows no group without a store
    group = make_group(0, ranks)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, make(0, ranks))
    return group
