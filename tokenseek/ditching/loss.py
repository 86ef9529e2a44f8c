"""Cross-entropy of the selected rows, without ever holding their logits all at once.

Shapes: B batch, T tokens, S selected, R supervised rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from tokenseek.modeling import Decoder, head_logits

IGNORED = -100
# Logits of one chunk of rows in float32; bounds the head's memory whatever the vocabulary.
CHUNK_BYTES = 64 * 2**20


def next_token_labels(labels_BT: torch.Tensor) -> torch.Tensor:
    """Labels shifted so that position t holds the label of token t + 1; the last position predicts nothing."""
    return pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]


def selected_loss(
    decoder: Decoder,
    body_output,
    hidden_BSD: torch.Tensor,
    labels_BS: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Sum of the cross-entropies of supervised rows over their number, or over `num_items_in_batch` when given.

    With no supervised row the loss is 0 with a live graph, so that every gradient exists and every collective runs.
    """
    hidden_RD, labels_R = hidden_BSD.flatten(0, 1), labels_BS.flatten()
    supervised = labels_R.ne(IGNORED).nonzero().squeeze(1)
    if len(supervised) == 0:
        supervised = supervised.new_zeros(1)
    hidden_RD, labels_R = hidden_RD[supervised], labels_R[supervised]

    def chunk_loss(hidden_1CD, labels_C):
        logits_CV = head_logits(decoder, body_output, hidden_1CD)[0]
        return cross_entropy(_at_least_float32(logits_CV), labels_C, ignore_index=IGNORED, reduction="sum")

    rows = max(1, CHUNK_BYTES // (4 * decoder.causal_lm.config.get_text_config().vocab_size))
    total = sum(
        checkpoint(chunk_loss, hidden_1CD, labels_C, use_reentrant=False)
        for hidden_1CD, labels_C in zip(hidden_RD[None].split(rows, dim=1), labels_R.split(rows), strict=True)
    )
    if num_items_in_batch is None:
        num_items_in_batch = labels_R.ne(IGNORED).sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
