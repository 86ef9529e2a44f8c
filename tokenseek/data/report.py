"""What became of the rows of training data: a report to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from tokenseek.data.sources import LoadedSource
from tokenseek.labels import IGNORED


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. Tokens count after truncation.

    Attributes:
        characters_cut: of texts so long that their end was not even tokenised; their tokens are not in `tokens_cut`.
        sources: a line on what each source is.
        template: the names of what renders the rows.
        notes: what else a user should know, such as files that were left out.
    """

    rows_read: int
    rows_filtered: int
    examples: int
    truncated_examples: int
    tokens_cut: int
    unsupervised_examples: int
    tokens: int
    supervised_tokens: int
    characters_cut: int = 0
    sources: tuple[str, ...] = ()
    template: str = ""
    notes: tuple[str, ...] = ()

    @property
    def supervised_share(self) -> float:
        """Tokens with a loss among all tokens."""
        return self.supervised_tokens / self.tokens

    def __str__(self) -> str:
        unread = f" and {self.characters_cut:,} characters that were not tokenised" if self.characters_cut else ""
        report = (
            f"{self.rows_read:,} rows read, {self.rows_filtered:,} dropped by filters, {self.examples:,} examples "
            f"prepared: {self.tokens:,} tokens, {self.supervised_tokens:,} of them with a loss. "
            f"{self.truncated_examples:,} examples were longer than max_length and lost {self.tokens_cut:,} tokens"
            f"{unread}. {self.unsupervised_examples:,} examples have no token with a loss: they are scored and add "
            "nothing to the training loss."
        )
        loss = f"template: {self.template}; loss on {self.supervised_share:.0%} of the tokens"
        return "\n".join([*self.sources, loss, report, *self.notes])


def make_report(
    examples: Dataset, rows: Dataset, loaded: Sequence[LoadedSource], described: tuple[str, ...], template: str
) -> DataReport:
    """What became of the rows of the sources.

    Args:
        examples: tokenised, with `num_cut` and `num_unread`.
        rows: rendered, with `place` and `left_out`.
        described, template: `sources` and `template` of :class:`DataReport`.
    """
    cut, unread = np.asarray(examples["num_cut"]), np.asarray(examples["num_unread"])
    lengths, supervised = [], []
    for batch in examples.select_columns("labels").with_format("arrow").iter(1000):
        for labels in batch["labels"]:
            labels = labels.values.to_numpy()
            lengths.append(len(labels))
            supervised.append(int((labels[1:] != IGNORED).sum()))  # the first token is never predicted
    notes = [note for part in loaded for note in part.notes]
    if (additional := len(examples) - len(rows)) > 0:
        notes.append(
            f"{additional:,} examples were added for turns that the chat template renders differently in a history "
            "(rewritten_turns: separate)."
        )
    shortened = [(place, what) for place, what in zip(rows["place"], rows["left_out"], strict=True) if what]
    if shortened:
        place, what = shortened[0]
        notes.append(
            f"WARNING: in {len(shortened):,} of {len(rows):,} conversations the chat template leaves out text of a "
            f"message, such as reasoning or a role that it does not know; first in {place}: {what}."
        )
    rows_read = sum(part.rows_read for part in loaded)
    return DataReport(
        rows_read=rows_read,
        rows_filtered=rows_read - sum(len(part.rows) for part in loaded),
        examples=len(examples),
        truncated_examples=int(((cut > 0) | (unread > 0)).sum()),
        tokens_cut=int(cut.sum()),
        unsupervised_examples=supervised.count(0),
        tokens=sum(lengths),
        supervised_tokens=sum(supervised),
        characters_cut=int(unread.sum()),
        sources=described,
        template=template,
        notes=tuple(notes),
    )
