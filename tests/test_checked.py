"""Kept files: what is not byte for byte what was written is refused."""

import random

import numpy as np
import pytest
from safetensors.numpy import load_file

from npti_export.checked import encode_checked, load_checked, save_checked
from npti_export.errors import DamagedError, ProfileError
from npti_export.stats import ContrastStats, load_stats, save_stats

ARRAYS = {
    "counts": np.arange(12, dtype=np.int64).reshape(3, 4),
    "values": np.linspace(-1, 1, 6, dtype=np.float32),
    "nothing": np.zeros((0, 3), np.float64),
}
RECORD = {"batches": 3, "note": 'an "npti":"sha256:' + "0" * 64 + ' " that is none, \u00df'}


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "kept.safetensors"
    save_checked(path, ARRAYS, RECORD)
    return path


def test_read_back(kept):
    arrays, record = load_checked(kept)
    assert record == RECORD
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    before = kept.read_bytes()
    assert encode_checked(ARRAYS, RECORD) == before
    save_checked(kept, ARRAYS, dict(reversed(RECORD.items())))
    assert kept.read_bytes() == before
    np.testing.assert_array_equal(load_file(kept)["counts"], ARRAYS["counts"])  # a file like any other


def test_every_byte_counts(kept):
    """Each byte of the file in turn with one bit turned over; a letter's case (bit 5) among them."""
    whole = kept.read_bytes()
    for place in range(len(whole)):
        for bit in {place % 8, 5}:
            kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(DamagedError, match=r"kept\.safetensors: is damaged"):
                load_checked(kept)


def test_every_length_counts(kept):
    whole = kept.read_bytes()
    for size in range(len(whole)):
        kept.write_bytes(whole[:size])
        with pytest.raises(DamagedError):
            load_checked(kept)
    for more in (b"\0", b" ", whole):
        kept.write_bytes(whole + more)
        with pytest.raises(DamagedError):
            load_checked(kept)


def test_damage_of_other_kinds(kept, tmp_path):
    """Zeroed, swapped and repeated pieces, and what is no such file at all."""
    whole, draw = kept.read_bytes(), random.Random(0)
    for _ in range(300):
        start, end = sorted(draw.sample(range(len(whole) + 1), 2))
        piece = draw.choice([bytes(end - start), whole[start:end][::-1], whole[start:end] * 2, draw.randbytes(9), b""])
        damaged = whole[:start] + piece + whole[end:]
        if damaged != whole:
            kept.write_bytes(damaged)
            with pytest.raises(DamagedError):
                load_checked(kept)
    for other in (
        b"",
        b"{}",
        (2).to_bytes(8, "little") + b"[]",
        b"\xff" * 99,
        (20000).to_bytes(8, "little") + b"[" * 20000,
    ):
        kept.write_bytes(other)
        with pytest.raises(DamagedError):
            load_checked(kept)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(DamagedError):
            load_checked(missing)


def test_the_checksum_of_another_file(kept, tmp_path):
    """Right in itself, but not for these numbers."""
    other = tmp_path / "other.safetensors"
    save_checked(other, {**ARRAYS, "counts": ARRAYS["counts"] + 1}, RECORD)
    one, two = kept.read_bytes(), other.read_bytes()
    end = 8 + int.from_bytes(one[:8], "little")
    for mixed in (one[:end] + two[end:], two[:end] + one[end:]):
        kept.write_bytes(mixed)
        with pytest.raises(DamagedError, match="checksum is wrong"):
            load_checked(kept)


def test_statistics_carry_it(tmp_path):
    path = tmp_path / "s.safetensors"
    save_stats(path, ContrastStats.empty(2, 3), {"batches": 1})
    assert load_stats(path)[1] == {"batches": 1}
    whole, draw = path.read_bytes(), random.Random(1)
    for place in draw.sample(range(len(whole)), 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(ProfileError, match="damaged statistics"):
            load_stats(path)
