"""Encoding: rendered texts become token ids, labels, stable example ids and the fingerprints of a data set.

Prompt and response are tokenised as one string, as in Stanford Alpaca, and the labels follow from the tokens' character
offsets. Tokenising the parts apart would give other ids at the seam (a SentencePiece tokenizer puts a space in front of
every part), which the model would never meet when it generates. A token that straddles the seam carries the loss.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from tokenseek.data.templates import TEMPLATES
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED


def encode_batch(
    rows: dict[str, list[Any]], positions: list[int], *, tokenizer: Any, max_length: int, labels: str
) -> dict[str, list[Any]]:
    """Encodes a batch of rendered rows (`text`, `spans`, `add_special_tokens`) that are at `positions` of the data set.

    Returns columns `example_id`, `input_ids` [T] int32, `labels` [T] int32 (input_ids or -100, not shifted) and
    `num_cut`, the number of tokens behind `max_length` that were cut off.
    """
    encoded: list[tuple[np.ndarray, np.ndarray]] = [None] * len(positions)
    for flag in (True, False):
        chosen = [number for number, add in enumerate(rows["add_special_tokens"]) if add is flag]
        if chosen:
            tokens = tokenizer(
                [rows["text"][number] for number in chosen],
                add_special_tokens=flag,
                return_offsets_mapping=True,
                return_attention_mask=False,
                truncation=False,
                verbose=False,
            )
            for number, ids, offsets in zip(chosen, tokens["input_ids"], tokens["offset_mapping"], strict=True):
                encoded[number] = np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

    out = {"example_id": [], "input_ids": [], "labels": [], "num_cut": []}
    for position, text, spans, (ids, offsets) in zip(positions, rows["text"], rows["spans"], encoded, strict=True):
        if not len(ids):
            raise UserError(f"example {position} has no tokens: its text is {text!r}; drop such rows from the data")
        carries_loss = np.ones(len(ids), bool) if labels == "sequence" else _supervised_tokens(text, spans, offsets)
        out["example_id"].append(f"{position:08d}-{digest(text, json.dumps(spans))}")
        out["input_ids"].append(ids[:max_length])
        out["labels"].append(np.where(carries_loss, ids, IGNORED).astype(np.int32)[:max_length])
        out["num_cut"].append(max(0, len(ids) - max_length))
    return out


def _supervised_tokens(text: str, spans: Iterable[tuple[int, int]], offsets: np.ndarray) -> np.ndarray:
    """Which tokens hold a supervised character, [T] bool, from the tokens' character `offsets` [T, 2].

    Tokens without characters follow their predecessor: BOS carries no loss, an EOS that the tokenizer adds after the
    response does.
    """
    supervised_before = np.zeros(len(text) + 1, np.int64)  # number of supervised characters before each character
    for start, end in spans:
        supervised_before[start + 1 : end + 1] = 1
    supervised_before = supervised_before.cumsum()
    start, end = offsets.T
    carries_loss = supervised_before[end] > supervised_before[start]
    for token in np.flatnonzero(start == end):
        carries_loss[token] = token > 0 and carries_loss[token - 1]
    return carries_loss


def eos_to_append(tokenizer: Any, append_eos: bool) -> str:
    """The end-of-sequence text to put after a response: empty when not asked for or when the tokenizer adds it itself.

    Raises:
        UserError: the tokenizer has no EOS token, or cannot map tokens to characters.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot map tokens to characters; use a model that "
            "has a tokenizer.json"
        )
    if not append_eos:
        return ""
    if tokenizer.eos_token is None:
        raise UserError("data.append_eos: the tokenizer has no end-of-sequence token; set data.append_eos to false")
    ids = tokenizer("a")["input_ids"]
    return "" if ids and ids[-1] == tokenizer.eos_token_id else tokenizer.eos_token


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Digest of vocabulary, merges, normalisation and special tokens: equal digests give equal ids for every text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whichever call padded or truncated last; `encode_batch` does neither.
    backend.pop("padding", None)
    backend.pop("truncation", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest(json.dumps(backend, sort_keys=True), json.dumps(special, sort_keys=True))


def template_fingerprint(tokenizer: Any, template: str, append_eos: bool, kinds: Iterable[str]) -> str:
    """Digest of what turns the rows of these kinds of source into texts."""
    kinds = sorted(set(kinds))
    texts = TEMPLATES[template] if "instruction" in kinds else {}
    chat_template = tokenizer.get_chat_template() if "chat" in kinds else ""
    return digest(json.dumps([kinds, texts, append_eos]), chat_template)


def digest(*texts: str) -> str:
    """64-bit BLAKE2b of texts, in hex; the boundaries between the texts count."""
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
