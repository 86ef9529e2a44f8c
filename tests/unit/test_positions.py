"""Selected positions as bits: what is written is read back, in as many bytes as the docs say."""

import numpy as np
import pytest

from tokenseek.errors import UserError
from tokenseek.index.positions import SelectedPositions


def test_positions_are_read_back(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 50)
    chosen = [np.sort(rng.choice(length, rng.integers(0, length + 1), replace=False)) for length in lengths]
    written = SelectedPositions.of(lengths, chosen, {"rule": "top", "ratio": 0.5})
    written.save(tmp_path / "positions.npz")
    read = SelectedPositions.load(tmp_path / "positions.npz")
    assert len(read) == 50 and read.facts == {"rule": "top", "ratio": 0.5}
    assert [part.name for part in tmp_path.iterdir()] == ["positions.npz"]
    for row, positions in enumerate(chosen):
        np.testing.assert_array_equal(read[row], positions)
    with pytest.raises(IndexError, match="rows 0 to 49"):
        read[50]


def test_half_of_open_platypus_takes_less_than_a_megabyte(tmp_path):
    # The paper's 6.8 MB for half of the tokens of 21,221 examples, at two bytes a position: 6.8 million tokens.
    lengths = np.full(21_221, 6_800_000 // 21_221)
    half = np.arange(0, lengths[0], 2)
    SelectedPositions.of(lengths, [half] * len(lengths)).save(tmp_path / "half.npz")
    assert (tmp_path / "half.npz").stat().st_size <= 900_000


def test_what_is_not_a_file_of_positions_is_refused(tmp_path):
    path = tmp_path / "positions.npz"
    with pytest.raises(UserError, match="there is no file"):
        SelectedPositions.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="damaged or no archive"):
        SelectedPositions.load(path)
    np.savez(path, bits=np.zeros(1, np.uint8))
    with pytest.raises(UserError, match="version, facts, lengths missing"):
        SelectedPositions.load(path)
    SelectedPositions.of([9], [[8]]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="damaged"):
        SelectedPositions.load(path)
    with pytest.raises(UserError, match=r"example 1 has 3 tokens; positions \[0, 3\]"):
        SelectedPositions.of([2, 3], [[0], [0, 3]])
