"""From examples and their scores to batches that say which tokens are trained on.

Shapes: B batch, T tokens of the longest example, S selected tokens of the example that has most. Packed, B is 1 and T
and S are those of all examples together.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tokenseek.data.packing import unpacked
from tokenseek.errors import UserError
from tokenseek.index import TokenIndex, tokens_crc
from tokenseek.labels import IGNORED
from tokenseek.selection import SelectionRule, select_weighted, supervised_positions
from tokenseek.selection.batched import draw_key

# The token ids or labels of one example, without padding.
Numbers: TypeAlias = Sequence[int] | np.ndarray


class PaddingCollator:
    """Pads examples on the right into ``input_ids``, ``attention_mask`` and ``labels`` [B, T].

    Args:
        pad_token_id: written at padding; never seen by the model's other tokens, so any id does.
        pad_to_multiple_of: round T up, for kernels that like round shapes.
    """

    def __init__(self, pad_token_id: int = 0, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return self.pad([f["input_ids"] for f in features], [f["labels"] for f in features])

    def pad(self, input_ids: Sequence[Numbers], labels: Sequence[Numbers]) -> dict[str, torch.Tensor]:
        """Int64 `input_ids`, `attention_mask` and `labels` [B, T], T a multiple of `pad_to_multiple_of`."""
        longest = max(map(len, input_ids))
        tokens = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return {
            "input_ids": pad_rows(input_ids, self.pad_token_id, tokens),
            "attention_mask": pad_rows([np.ones(len(ids)) for ids in input_ids], 0, tokens),
            "labels": pad_rows(labels, IGNORED, tokens),
        }


def pack_rows(input_ids: Sequence[Numbers], labels: Sequence[Numbers]) -> dict[str, torch.Tensor]:
    """Examples one behind the other in one row, ``input_ids``, ``position_ids`` and ``labels`` [1, T].

    Positions restart with every example, by which models distinguish examples, and no label stands where the end of
    one example would predict the beginning of the next.
    """
    kept = [np.append(IGNORED, row[1:]) for row in labels]
    return {
        "input_ids": pad_rows([np.concatenate(input_ids)], 0),
        "position_ids": pad_rows([np.concatenate([np.arange(len(ids)) for ids in input_ids])], 0),
        "labels": pad_rows([np.concatenate(kept)], IGNORED),
    }


class TokenSeekCollator(PaddingCollator):
    """Pads examples as :class:`PaddingCollator` does and adds ``selected_positions`` [B, S], chosen from an index, and
    ``shift_labels`` [B, S], the token that each of them has to predict (for TRL, which applies the head itself).

    Labels that no selected position predicts become -100, so that code that counts labels to normalise a loss
    (Transformers' Trainer over gradient accumulation and processes, for one) counts what the loss is summed over. Rule
    "sampled" keeps all labels and adds ``selected_weights`` [B, S] instead: its sum stands for that over all tokens.

    Examples come as mappings with ``example_id``, ``input_ids`` and ``labels``, as :func:`tokenseek.prepare_dataset`
    makes them; in a plain ``transformers.Trainer`` or ``SFTTrainer`` keep the first with
    ``remove_unused_columns=False``.

    Args:
        index: the scores, an open :class:`TokenIndex` or its path; None for rules without scores ("random", "all") and
            where the model selects.
        ratio: share of each example's tokens that are trained on, in (0, 1]; the rule's default where left out.
        rule: name of a rule, or a whole :class:`SelectionRule` (`ratio` and `options` then replace its fields). The
            default is what taught most per second (docs/evidence.md).
        online: leave the selection to the model (:func:`tokenseek.enable_token_ditching`): batches have all labels, the
            rule as ``selection`` and one key of its draws for each example as ``selection_keys`` [E]. By default so it
            is where a rule needs scores and no index is given.
        packing: lay the examples of a batch behind each other in one row instead of padding them: no ``attention_mask``
            then but ``position_ids`` that restart with every example. The batch has the same loss and gradients.
            Its items may be rows of a :class:`tokenseek.data.packing.PackedDataset`.
        options: other fields of :class:`SelectionRule`: alpha, beta, explore, bands, seed, scope, ...

    Random rules draw again in every epoch: call :meth:`set_epoch` at its start (:class:`TokenSeekTrainer` does).

    Example:
        >>> collator = TokenSeekCollator(pad_token_id=tokenizer.pad_token_id)  # the model scores and selects
        >>> paper = TokenSeekCollator("run/index.arrow", 0.1, "top", pad_token_id=tokenizer.pad_token_id)
    """

    def __init__(
        self,
        index: TokenIndex | str | None = None,
        ratio: float | None = None,
        rule: str | SelectionRule = SelectionRule.rule,
        *,
        pad_token_id: int = 0,
        pad_to_multiple_of: int = 1,
        packing: bool = False,
        online: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pad_token_id, pad_to_multiple_of)
        if online and index is not None:
            raise UserError("online=True scores in the training step and reads no index; leave one of them out.")
        if packing and pad_to_multiple_of > 1:
            raise UserError(f"pad_to_multiple_of={pad_to_multiple_of}, but packing=True pads nothing; leave one out.")
        self.packing = packing
        if ratio is not None:
            options["ratio"] = ratio
        self.rule = replace(rule, **options) if isinstance(rule, SelectionRule) else SelectionRule(rule, **options)
        self.online = index is None and self.rule.needs_scores if online is None else online
        if index is None and self.rule.needs_scores and not self.online:
            raise UserError(
                f"rule {self.rule.rule!r} selects by score and needs an index; give one (see `tokenseek score`), leave "
                "online=False out, so that the model scores in the training step, or use rule='random' or 'all'."
            )
        self.index = index if index is None or isinstance(index, TokenIndex) else TokenIndex.open(index)
        # Shared memory: workers that were started before a new epoch see it too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Number of the pass over the data that begins now; random rules draw by it."""
        self._epoch.fill_(epoch)

    def without_selection(self) -> PaddingCollator:
        """Padding over all tokens, for evaluation."""
        return PaddingCollator(self.pad_token_id, self.pad_to_multiple_of)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        features = unpacked(features)
        if self.online:
            return self._unselected(features)
        selected, weights = zip(*map(self._select, features), strict=True)
        targets = [_predicted_by(positions, f["labels"]) for positions, f in zip(selected, features, strict=True)]
        labels = []
        for feature, positions in zip(features, selected, strict=True):
            kept = np.append(IGNORED, feature["labels"][1:])
            if not self.rule.has_weights:
                selected_ones = np.zeros(len(kept) + 1, bool)
                selected_ones[positions + 1] = True
                kept[~selected_ones[:-1]] = IGNORED
            labels.append(kept)
        input_ids = [f["input_ids"] for f in features]
        if self.packing:
            batch = pack_rows(input_ids, labels)
            starts = accumulate(map(len, input_ids[:-1]), initial=0)
            selected = [np.concatenate([positions + start for positions, start in zip(selected, starts, strict=True)])]
            targets, weights = [np.concatenate(targets)], [np.concatenate(weights)]
        else:
            batch = self.pad(input_ids, labels)
        batch["selected_positions"] = pad_rows(selected, -1)
        batch["shift_labels"] = pad_rows(targets, IGNORED)
        if self.rule.has_weights:
            batch["selected_weights"] = pad_sequence([torch.as_tensor(w, dtype=torch.float32) for w in weights], True)
        return batch

    def _unselected(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch whose tokens the model selects."""
        input_ids = [f["input_ids"] for f in features]
        labels = [np.append(IGNORED, f["labels"][1:]) for f in features]
        batch: dict[str, Any] = pack_rows(input_ids, labels) if self.packing else self.pad(input_ids, labels)
        keys = [draw_key(zlib.crc32(_example_id(f).encode()), self._visit(f)) for f in features]
        return {**batch, "selection": self.rule, "selection_keys": torch.tensor(keys, dtype=torch.int64)}

    def _visit(self, feature: Mapping[str, Any]) -> int:
        """Number of the pass over the data; an example of a stream brings its own."""
        return int(feature.get("visit", self._epoch))

    def select(self, feature: Mapping[str, Any]) -> np.ndarray:
        """Selected positions of one example, int64 [S], ascending."""
        return self._select(feature)[0]

    def _select(self, feature: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        input_ids, example_id = feature["input_ids"], _example_id(feature)
        if self.index is None:
            row, context, gradient = zlib.crc32(example_id.encode()), None, None
        else:
            row = self.index.row_of(example_id)
            if self.index.tokens_crc(row) != tokens_crc(input_ids):
                raise UserError(
                    f"example {example_id!r} has other tokens ({len(input_ids)}) than those scored in "
                    f"{self.index.path} ({self.index.num_tokens(row)}): its tokenizer, template or maximum length "
                    "differ. Score it again."
                )
            context, gradient = self.index.scores(row)
        return select_weighted(
            self.rule,
            context,
            gradient,
            row=row,
            visit=self._visit(feature),
            supervised=supervised_positions(feature["labels"]),
            num_tokens=len(input_ids),
        )


def _example_id(feature: Mapping[str, Any]) -> str:
    if "example_id" not in feature:
        raise UserError(
            f"an example has no example_id (only {sorted(feature)}). Prepare the data with "
            "tokenseek.prepare_dataset and train with remove_unused_columns=False."
        )
    example_id: str = feature["example_id"]
    return example_id


def pad_rows(rows: Sequence[Numbers], fill: int, length: int | None = None) -> torch.Tensor:
    """int64 [B, `length`], each row filled up on the right."""
    padded = np.full((len(rows), length or max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def _predicted_by(positions: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """[S]: the label of the token after each position; -100 after the last."""
    next_labels: np.ndarray = np.append(np.asarray(labels)[1:], IGNORED)
    predicted: np.ndarray = next_labels[positions]
    return predicted
