"""Encoding: rendered texts become token ids, labels, stable example ids and the fingerprints of a data set.

Prompt and response are tokenised as one string, as in Stanford Alpaca, and the labels follow from the tokens' character
offsets. Tokenising the parts apart would give other ids at the seam (a SentencePiece tokenizer puts a space in front of
every part), which the model would never meet when it generates. A token that straddles the seam carries the loss.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenseek.data.templates import TEMPLATES
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED

Spans = Sequence[tuple[int, int]]

# So many tokens behind the last that is kept are tokenised with it. Where a text is cut, tokens differ from those of
# the whole text, but not for long: a merge depends on its neighbours, and a path of Viterbi's soon meets the best.
_MARGIN_TOKENS = 256


class Encoded(NamedTuple):
    """Tokens of a text: `input_ids` and `labels` [T] int32, and what was left out (:func:`encode_batch`)."""

    input_ids: np.ndarray
    labels: np.ndarray
    num_cut: int
    num_unread: int


class Encoder:
    """Rendered texts to token ids and labels, at most `max_length` of them.

    Of a text that is far longer only the beginning is tokenised: as many characters as `max_length` tokens can have,
    and a margin, since the end of a piece may be cut into other tokens than in the whole text. Where a normaliser makes
    these characters fewer tokens, twice as many are taken.
    """

    def __init__(self, tokenizer: Any, max_length: int, labels: str) -> None:
        self.tokenizer, self.max_length, self.labels = tokenizer, max_length, labels
        self.tokens_needed = max_length + _MARGIN_TOKENS
        self.characters_needed = self.tokens_needed * max(map(len, tokenizer.get_vocab()))

    def encode(self, texts: Sequence[str], spans: Sequence[Spans], add_special_tokens: bool) -> list[Encoded]:
        """Tokens of each text, with the loss on the characters of its `spans`."""
        pieces = [text[: self.characters_needed] for text in texts]
        encoded = []
        for text, piece, text_spans, (ids, offsets) in zip(
            texts, pieces, spans, self._tokenise(pieces, add_special_tokens), strict=True
        ):
            while len(piece) < len(text) and len(ids) < self.tokens_needed:
                piece = text[: 2 * len(piece)]
                [(ids, offsets)] = self._tokenise([piece], add_special_tokens)
            carries_loss = (
                np.ones(len(ids), bool) if self.labels == "sequence" else _supervised_tokens(text_spans, offsets)
            )
            labels = np.where(carries_loss, ids, IGNORED).astype(np.int32)
            unread = len(text) - len(piece)
            encoded.append(
                Encoded(ids[: self.max_length], labels[: self.max_length], max(0, len(ids) - self.max_length), unread)
            )
        return encoded

    def _tokenise(self, texts: list[str], add_special_tokens: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids [T] and the characters (start, end) [T, 2] that each token stands for."""
        tokens = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return [
            (np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2))
            for ids, offsets in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ]


def encode_batch(rows: dict[str, list[Any]], positions: list[int], *, encoder: Encoder) -> dict[str, list[Any]]:
    """Encodes a batch of rendered rows that are at `positions` of the data set.

    A row has a `place` and examples, each of which has a `text`, its supervised `spans` and `add_special_tokens`.

    Returns columns `example_id`, `input_ids` [T] int32, `labels` [T] int32 (input_ids or -100, not shifted), and, for
    reports, `num_cut`, the number of tokens behind the maximum length that were cut off, and `num_unread`, of
    characters behind those that were not tokenised.
    """
    examples = [
        (position, number, place, *example)
        for position, place, texts, spans, adds in zip(
            positions, rows["place"], rows["text"], rows["spans"], rows["add_special_tokens"], strict=True
        )
        for number, example in enumerate(zip(texts, spans, adds, strict=True))
    ]
    encoded: dict[int, Encoded] = {}
    for flag in (True, False):
        chosen = [number for number, example in enumerate(examples) if example[-1] is flag]
        if chosen:
            texts, spans = [examples[example][3] for example in chosen], [examples[example][4] for example in chosen]
            for example, tokens in zip(chosen, encoder.encode(texts, spans, flag), strict=True):
                encoded[example] = tokens

    out: dict[str, list[Any]] = {"example_id": [], "input_ids": [], "labels": [], "num_cut": [], "num_unread": []}
    for example, (position, number, place, text, spans, _) in enumerate(examples):
        tokens = encoded[example]
        if not len(tokens.input_ids):
            raise UserError(f"{place}: the example has no tokens: its text is {text!r}; drop such rows from the data")
        part = f".{number}" if number else ""  # of a row that became several examples
        out["example_id"].append(f"{position:08d}{part}-{digest(text, json.dumps(spans))}")
        for name, value in tokens._asdict().items():
            out[name].append(value)
    return out


def row_of(example_id: str) -> str:
    """What the ids of all examples of one row have in common."""
    return example_id.partition("-")[0].partition(".")[0]


def _supervised_tokens(spans: Spans, offsets: np.ndarray) -> np.ndarray:
    """Which tokens hold a supervised character, [T] bool, from the tokens' character `offsets` [T, 2].

    Tokens without characters follow their predecessor: BOS carries no loss, an EOS that the tokenizer adds after the
    response does.
    """
    if not len(spans):
        return np.zeros(len(offsets), bool)
    starts, ends = np.asarray(spans, np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], np.cumsum(ends - starts)])  # supervised characters before each span

    def supervised_before(character: np.ndarray) -> np.ndarray:
        span = np.searchsorted(starts, character, side="right") - 1  # the last that begins there or before
        inside = np.minimum(character, ends[span]) - starts[span]
        return np.where(span < 0, 0, before[span] + inside)

    start, end = offsets.T
    carries_loss = supervised_before(end) > supervised_before(start)
    for token in np.flatnonzero(start == end):
        carries_loss[token] = token > 0 and carries_loss[token - 1]
    return carries_loss


def require_usable(tokenizer: Any, append_eos: bool) -> None:
    """
    Raises:
        UserError: the tokenizer has no EOS token to append, or cannot map tokens to characters.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot map tokens to characters; use a model that "
            "has a tokenizer.json"
        )
    if append_eos and tokenizer.eos_token is None:
        raise UserError("data.append_eos: the tokenizer has no end-of-sequence token; set data.append_eos to false")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Digest of vocabulary, merges, normalisation and special tokens: equal digests give equal ids for every text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whichever call padded or truncated last; `encode_batch` does neither.
    backend.pop("padding", None)
    backend.pop("truncation", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest(json.dumps(backend, sort_keys=True), json.dumps(special, sort_keys=True))


def template_fingerprint(
    template: str, append_eos: bool, kinds: Iterable[str], chat_template: str, chat_settings: Mapping[str, Any]
) -> str:
    """Digest of what turns the rows of these kinds of source into texts.

    Args:
        chat_template: empty where no source is rendered by it.
        chat_settings: those of `data` that conversations are rendered with; at their defaults they leave no trace.
    """
    kinds = sorted(set(kinds))
    texts = TEMPLATES.get(template, {}) if "instruction" in kinds else {}
    settings = [dict(sorted(chat_settings.items()))] if chat_template and chat_settings else []
    return digest(json.dumps([kinds, texts, append_eos, *settings]), chat_template)


def digest(*texts: str) -> str:
    """64-bit BLAKE2b of texts, in hex; the boundaries between the texts count."""
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
