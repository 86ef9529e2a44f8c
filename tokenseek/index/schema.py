"""What an index holds: one row per example, and a header that says which model and data the scores belong to.

T is the number of tokens of one example.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from tokenseek.errors import UserError

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("row", pa.int64()),
        ("num_tokens", pa.int32()),
        ("tokens_crc", pa.uint32()),
        ("context", pa.large_list(pa.float32())),
        ("gradient", pa.large_list(pa.float32())),
        ("scores_crc", pa.uint32()),
    ]
)

_HEADER_KEY, _HEADER_CRC_KEY = b"tokenseek", b"tokenseek_crc32"

# A record batch ends after this many tokens (8 MiB of scores) or rows. Batches depend on the examples alone, so the
# file's bytes do too, and a merge holds one batch in memory however large the index is.
_BATCH_TOKENS, _BATCH_ROWS = 1 << 20, 4096


@dataclass(frozen=True)
class IndexHeader:
    """What the scores were computed from.

    Args:
        fingerprints: `model`, `tokenizer`, `template`, `data`, `max_length` and `labels` of the scoring run.
        scoring: the scoring options that were used.
        num_examples: number of examples; None while unknown (a plan may leave it out, an index always has it).
        num_tokens: number of tokens of all examples; None while unknown.
    """

    fingerprints: dict[str, str | int]
    scoring: dict[str, Any] = field(default_factory=dict)
    num_examples: int | None = None
    num_tokens: int | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """One line, with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "IndexHeader":
        """Raises `UserError` for anything that `to_json` of this version did not write."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"The header of the index is not JSON ({error}); score again.") from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"The index has schema version {version!r}; this TokenSeek reads version {SCHEMA_VERSION}. "
                "Install the TokenSeek that wrote it, or score again."
            )
        expected = {f.name for f in fields(cls)}
        if content.keys() != expected:
            raise UserError(f"The header of the index has keys {sorted(content)}, not {sorted(expected)}; score again.")
        return cls(**content)

    def to_metadata(self) -> dict[bytes, bytes]:
        """The header as metadata of an Arrow schema, with its checksum."""
        text = self.to_json().encode()
        return {_HEADER_KEY: text, _HEADER_CRC_KEY: str(zlib.crc32(text)).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None) -> "IndexHeader":
        """The header in the metadata of an Arrow schema.

        Raises:
            UserError: there is none, or its checksum is another.
        """
        text, crc = (metadata or {}).get(_HEADER_KEY), (metadata or {}).get(_HEADER_CRC_KEY)
        if text is None or crc != str(zlib.crc32(text)).encode():
            raise UserError("This is no index of TokenSeek, or its header is damaged.")
        return cls.from_json(text)

    def flat(self) -> dict[str, Any]:
        """The header as one flat dict of dotted names, as JSON would give it back (tuples become lists)."""
        content: dict[str, Any] = json.loads(self.to_json())
        for section in ("fingerprints", "scoring"):
            content |= {f"{section}.{key}": value for key, value in content.pop(section).items()}
        return content


def differences(stored: dict[str, Any], wanted: dict[str, Any], stored_name: str, wanted_name: str) -> list[str]:
    """One line, with both values, for every key whose value differs; a key that one side lacks differs too."""
    lacking = object()
    lines = []
    for key in sorted(stored.keys() | wanted.keys()):
        ours, theirs = stored.get(key, lacking), wanted.get(key, lacking)
        if ours != theirs:
            ours, theirs = ("nothing" if value is lacking else repr(value) for value in (ours, theirs))
            lines.append(f"{key}: {stored_name} has {ours}, {wanted_name} has {theirs}")
    return lines


@dataclass(frozen=True, eq=False)
class ScoredExample:
    """The scores of one example.

    Args:
        example_id: stable id of the example, unique in its data set.
        row: position of the example in its data set.
        tokens_crc: `tokens_crc(input_ids)`.
        context: float32 [T], I1 of Eq. 3.
        gradient: float32 [T], I2 of Eq. 4.
    """

    example_id: str
    row: int
    tokens_crc: int
    context: np.ndarray
    gradient: np.ndarray

    def __post_init__(self) -> None:
        for name in ("context", "gradient"):
            # Free for a view of a memory-mapped column. A score too large for float32 becomes inf, which `fault` names.
            with np.errstate(over="ignore"):
                object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype="<f4"))

    @property
    def num_tokens(self) -> int:
        """Of the example, as many as it has scores of each kind."""
        return len(self.context)

    def fault(self) -> str | None:
        """What keeps these scores out of an index, or None."""
        if self.row < 0:
            return f"its row is {self.row}; rows count from 0"
        if self.context.ndim != 1 or self.context.shape != self.gradient.shape:
            return (
                f"context scores have shape {self.context.shape} and gradient scores {self.gradient.shape}; "
                "both must be [T]"
            )
        if not self.num_tokens:
            return "it has no tokens"
        for name in ("context", "gradient"):
            bad = np.flatnonzero(~np.isfinite(getattr(self, name)))
            if bad.size:
                value = getattr(self, name)[bad[0]]
                return f"{bad.size} of {self.num_tokens} {name} scores are not finite (first: {value} at {bad[0]})"
        if self.context.min() < 0:
            return f"a context score is {self.context.min()}; sums of attention weights (Eq. 3) are never below 0"
        return None


def row_crc(example: ScoredExample) -> int:
    """CRC-32 over everything that a row of the index says about a `ScoredExample`, not only its scores.

    A flipped bit in an example's id or its token checksum would otherwise go unseen.
    """
    crc = zlib.crc32(example.example_id.encode())
    crc = zlib.crc32(struct.pack("<qqI", example.row, example.num_tokens, example.tokens_crc), crc)
    return zlib.crc32(example.gradient.data, zlib.crc32(example.context.data, crc))


def record_batches(examples: Iterable[ScoredExample]) -> Iterator[pa.RecordBatch]:
    """Group examples into record batches, whose boundaries depend on nothing but the examples."""
    pending, tokens = [], 0
    for example in examples:
        pending.append(example)
        tokens += example.num_tokens
        if tokens >= _BATCH_TOKENS or len(pending) == _BATCH_ROWS:
            yield _record_batch(pending)
            pending, tokens = [], 0
    if pending:
        yield _record_batch(pending)


def _record_batch(examples: list[ScoredExample]) -> pa.RecordBatch:
    lengths = [example.num_tokens for example in examples]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def scores(name: str) -> pa.Array:
        values = np.concatenate([getattr(example, name) for example in examples])
        return pa.LargeListArray.from_arrays(offsets, pa.array(values, pa.float32()))

    columns = {
        "example_id": [example.example_id for example in examples],
        "row": [example.row for example in examples],
        "num_tokens": lengths,
        "tokens_crc": [example.tokens_crc for example in examples],
        "context": scores("context"),
        "gradient": scores("gradient"),
        "scores_crc": [row_crc(example) for example in examples],
    }
    return pa.record_batch(columns, schema=SCHEMA)
