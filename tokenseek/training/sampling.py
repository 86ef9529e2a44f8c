"""The order of the examples in an epoch, the same for any number of processes.

All processes need a batch in every round. Where the examples run out, Transformers and accelerate fill the last round
with examples from the beginning of the epoch, which are then trained on twice as often as the others, and losses depend
on the number of processes. Here blank examples, which carry no loss, fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from tokenseek.data.packing import blank_copy


class EpochSampler(Sampler[int]):
    """Positions of a data set's examples, in an order drawn again in every epoch, and then those of its blanks.

    Args:
        examples: number of examples; their positions are 0 to `examples` - 1.
        blanks: number of blanks behind them.
        seed: of the order, which also is Transformers' own for this seed; None keeps the data's order.

    Example:
        >>> list(EpochSampler(3, 1, seed=None))
        [0, 1, 2, 3]
    """

    def __init__(self, examples: int, blanks: int, seed: int | None) -> None:
        self.examples, self.blanks, self.seed, self.epoch = examples, blanks, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """From now on, draw for this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.examples + self.blanks

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            yield from range(self.examples)
        else:
            yield from self.order(torch.Generator().manual_seed(self.seed + self.epoch))
        yield from range(self.examples, len(self))

    def order(self, generator: torch.Generator) -> list[int]:
        """Positions of all examples, as drawn for an epoch."""
        return torch.randperm(self.examples, generator=generator).tolist()


class LengthGroupedSampler(EpochSampler):
    """An :class:`EpochSampler` that puts examples of similar lengths side by side, as Transformers' of this name does.

    Args:
        lengths: of the examples, in tokens.
        group: so many examples in a row are of similar lengths: those of an optimizer step.
    """

    def __init__(self, lengths: Sequence[int], blanks: int, seed: int, group: int) -> None:
        super().__init__(len(lengths), blanks, seed)
        self.lengths, self.group = lengths, group

    def order(self, generator: torch.Generator) -> list[int]:
        """Positions of all examples, in groups of about equal lengths."""
        order: list[int] = get_length_grouped_indices(self.lengths, self.group, generator=generator)
        return order


class WithBlanks(Dataset[Any]):
    """A data set followed by copies of its first example without a label.

    Args:
        examples: mappings with ``labels``, or rows of a :class:`tokenseek.data.packing.PackedDataset`.
        blanks: number of copies.
    """

    def __init__(self, examples: Sequence[dict[str, Any]], blanks: int) -> None:
        self.examples, self.blanks = examples, blanks

    def __len__(self) -> int:
        return len(self.examples) + self.blanks

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position < len(self.examples):
            return self.examples[position]
        return blank_copy(self.examples[0])
