"""The paper's layout (section S7.1), for comparison: contiguous shards between layers, regrouped and restored in each.

Contiguous shards hold uneven shares of the selected tokens. Inside a layer, rows are therefore dealt evenly, which
takes an all-to-all of hidden states on the way in and one on the way out, in every layer.

Shapes: B batch, A rows of one pass over all ranks, P ranks, R rows on one rank while a layer runs, C rows on one rank
between layers, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from tokenseek.ulysses.all_to_all import exchange_rows
from tokenseek.ulysses.layout import Shards


@dataclass(frozen=True)
class Move:
    """Rows of one rank from the slots of one layout into those of another.

    Attributes:
        take, put: flat slots (of B x slots) that the rows sent are in, by receiver, and the rows received go to, by
            sender.
        send, receive: how many to and from each rank.
        slots: per example, of the layout moved to.
    """

    take: torch.Tensor
    send: list[int]
    put: torch.Tensor
    receive: list[int]
    slots: int

    def __call__(self, group: dist.ProcessGroup, rows: torch.Tensor) -> torch.Tensor:
        """[B, slots before, D] -> [B, slots after, D]; empty slots hold zeros."""
        received = exchange_rows(group, rows.flatten(0, 1)[self.take], self.send, self.receive)
        moved = received.new_zeros(len(rows) * self.slots, rows.shape[-1])
        return moved.index_copy(0, self.put, received).unflatten(0, (len(rows), self.slots))


def plan_move(before: Shards, after: Shards, rank: int) -> Move:
    """How `rank` takes part in moving all rows from the layout `before` to `after`, which hold the same positions."""
    ranks = before.positions_BPR.shape[1]
    source, from_slot = _places(before)
    target, to_slot = _places(after)
    # Rows are numbered by their place in the text on both sides, so sender and receiver agree on their order.
    outgoing, incoming = source == rank, target == rank
    by_receiver = target[outgoing].argsort(stable=True)
    by_sender = source[incoming].argsort(stable=True)
    counts = torch.stack([target[outgoing].bincount(minlength=ranks), source[incoming].bincount(minlength=ranks)])
    send, receive = counts.tolist()
    return Move(
        from_slot[outgoing][by_receiver], send, to_slot[incoming][by_sender], receive, after.positions_BPR.shape[2]
    )


def _places(shards: Shards) -> tuple[torch.Tensor, torch.Tensor]:
    """[A] rank and flat slot of every row, in the order of (example, position)."""
    positions_BPR = shards.positions_BPR
    batch, ranks, slots = positions_BPR.shape
    example, rank, slot = (positions_BPR >= 0).nonzero(as_tuple=True)
    position = positions_BPR[example, rank, slot]
    order = (example * (position.max() + 1 if len(position) else 1) + position).argsort()
    return rank[order], (example * slots + slot)[order]
