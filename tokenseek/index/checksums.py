"""CRC-32 of an example's tokens and of a row of the index."""

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenseek.index.schema import ScoredExample


def tokens_crc(input_ids: npt.ArrayLike) -> int:
    """CRC-32 of an example's token ids, read as little-endian int32.

    Kept beside the scores so that training can tell that position t still is the token that was scored.

    Args:
        input_ids: T token ids (list, tuple or integer array), without padding.

    Example:
        >>> tokens_crc([1, 2, 3])
        2967478931
    """
    return zlib.crc32(np.asarray(input_ids, dtype="<i4").tobytes())


def row_crc(example: "ScoredExample") -> int:
    """CRC-32 over everything that a row of the index says about a `ScoredExample`, not only its scores.

    A flipped bit in an example's id or its token checksum would otherwise go unseen.
    """
    crc = zlib.crc32(example.example_id.encode())
    crc = zlib.crc32(struct.pack("<qqI", example.row, example.num_tokens, example.tokens_crc), crc)
    return zlib.crc32(example.gradient.data, zlib.crc32(example.context.data, crc))
