"""CRC-32 of an example's tokens."""

import zlib

import numpy as np
import numpy.typing as npt


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
