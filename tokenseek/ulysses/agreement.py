"""Ranks that share an example have to be given the same one; a mistake in a sampler would be summed silently otherwise.

Shapes: B batch, T tokens, S selected.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from tokenseek.errors import UserError

# Odd constants of splitmix64, as signed 64-bit numbers.
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def require_same(group: dist.ProcessGroup, **inputs: torch.Tensor | int | None) -> None:
    """Raise on all ranks of `group` unless all of them were given the same `inputs`, naming those that differ.

    One all-gather of two numbers per input, whatever its length.

    Raises:
        UserError: naming the inputs and the ranks.
    """
    device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
    mine = torch.stack([_digest(value, device) for value in inputs.values()])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    same = torch.stack([of_rank.eq(everyone[0]).all(-1) for of_rank in everyone]).tolist()
    ranks = [rank for rank, row in enumerate(same) if not all(row)]
    if not ranks:
        return
    names = [name for i, name in enumerate(inputs) if not all(row[i] for row in same)]
    given = ", ".join(
        f"{name} {list(value.shape) if isinstance(value, torch.Tensor) else value}"
        for name, value in inputs.items()
        if name in names
    )
    raise UserError(
        f"{' and '.join(names)} of rank(s) {', '.join(map(str, ranks))} of a sequence-parallel group differ from those "
        f"of its rank 0 (this is rank {group.rank()}, which was given {given}). All ranks of a group must be given the "
        "same examples and the same selection: let the sampler count data-parallel ranks only, and seed it alike."
    )


def _digest(value: torch.Tensor | int | None, device: torch.device) -> torch.Tensor:
    """int64 [2]: the shape and the contents, as good as unique."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor([-1, -1 if value is None else int(value)], device=device)
    shape = 0
    for length in (value.dim(), *value.shape):
        shape = shape * 1_000_003 + length
    content = value.detach().to(device).flatten()
    # Floats by their bits: a sum of rounded numbers would hide differences.
    content = content.double().view(torch.int64) if content.is_floating_point() else content.long()
    place = torch.arange(1, len(content) + 1, device=device)
    mixed = (content + place * _MIX[0]) * _MIX[1]
    mixed = (mixed ^ (mixed >> 29)) * _MIX[2]
    return torch.stack([torch.tensor(shape, device=device), (mixed ^ (mixed >> 32)).sum()])
