"""Reading headers and handling blocks, against gguf-py and ggml."""

import shutil
import struct

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import F16_SCALE

from npti_export.errors import GGUFError
from npti_export.gguf.blocks import (
    _SCALE_OFFSETS,
    decode,
    decode_columns,
    quantise,
    scale_rows,
    type_id_of,
)
from npti_export.gguf.reader import read_gguf

TYPES = ["F32", "F16", "BF16", *_SCALE_OFFSETS]


def random_rows(rows=6, length=512, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, length)).astype(np.float32)


def test_header_is_what_gguf_py_reads(default_model):
    ours, theirs = read_gguf(default_model), GGUFReader(default_model)
    names = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert [entry.key for entry in ours.keys] == names
    for key in names:
        assert ours.get(key) == theirs.fields[key].contents(), key
    assert len(ours.tensors) == len(theirs.tensors) == 272
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.shape, mine.type_id) == (
            other.name,
            tuple(other.shape.tolist()),
            int(other.tensor_type),
        )
        assert (mine.offset, mine.nbytes) == (other.data_offset, other.n_bytes)


@pytest.mark.parametrize("name", TYPES)
def test_block_sizes_and_scale_offsets_lie_inside_a_block(name):
    _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert all(offset + 2 <= nbytes for offset in _SCALE_OFFSETS.get(name, ()))


@pytest.mark.parametrize("name", TYPES)
def test_scaled_rows(name):
    """Dequantised by gguf-py: factor 1 keeps the bytes, 0 gives zeros, others scale every value within one rounding."""
    kind = type_id_of(name)
    rows = quantise(random_rows(), kind)
    factors = np.array([1, 0, 2, -1, 0.25, -0.0485], np.float32)
    scaled = scale_rows(rows, factors, kind)
    before, after = (dequantize(one, GGMLQuantizationType[name]).astype(float) for one in (rows, scaled))
    np.testing.assert_array_equal(scaled[0], rows[0])
    assert (after[1] == 0).all()
    exact = 0 if name != "BF16" else 2.0**-8
    for row in (2, 3, 4):  # powers of two round nothing
        np.testing.assert_allclose(after[row], before[row] * factors[row], rtol=exact, atol=1e-7)
    scale = np.abs(before[5]).max() * abs(factors[5])
    tolerance = {"F32": 1e-7, "BF16": 2.0**-8}.get(name, F16_SCALE)
    assert np.abs(after[5] - before[5] * factors[5]).max() <= 2 * tolerance * scale
    assert np.abs(after[5]).max() > 0.5 * scale


@pytest.mark.parametrize("name", TYPES)
def test_single_columns(name):
    kind = type_id_of(name)
    rows = quantise(random_rows(), kind)
    columns = np.array([511, 0, 33, 33, 256, 31])
    np.testing.assert_array_equal(decode_columns(rows, columns, kind), decode(rows, kind)[:, columns])


@pytest.mark.parametrize("name", TYPES)
def test_decoded_like_gguf_py(name):
    rows = quantise(random_rows(), type_id_of(name))
    np.testing.assert_allclose(decode(rows, type_id_of(name)), dequantize(rows, GGMLQuantizationType[name]), rtol=1e-6)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_like_gguf_py(name):
    values = random_rows()
    theirs = quantize(values, GGMLQuantizationType[name]).view(np.uint8).reshape(len(values), -1)
    np.testing.assert_array_equal(quantise(values, type_id_of(name)), theirs)


@pytest.mark.parametrize("name", TYPES)
def test_old_blocks_and_new_blocks_are_the_whole_quantised_at_once(name):
    kind = type_id_of(name)
    old, new = random_rows(4, 512), random_rows(4, 256, seed=1)
    whole = quantise(np.concatenate([old, new], axis=1), kind)
    np.testing.assert_array_equal(np.concatenate([quantise(old, kind), quantise(new, kind)], axis=1), whole)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(GGUFError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    for content in (b"", b"GGUF", b"PK\x03\x04" + b"\0" * 100, b"ggjt" + b"\1" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(GGUFError, match=r"not a GGUF file|truncated"):
            read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(("version", "says"), [(1, "version 1"), (4, "version 4"), (0x03000000, "big-endian")])
def test_versions(tmp_path, tiny, version, says):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", version) + tiny.read_bytes()[8:])
    with pytest.raises(GGUFError, match=says):
        read_gguf(path)


def test_every_truncation_is_noticed(tmp_path, tiny):
    data = tiny.read_bytes()
    path = tmp_path / "x.gguf"
    header = read_gguf(tiny).data_start
    for length in [*range(0, header, 997), header, header + 100, len(data) - 64]:
        path.write_bytes(data[:length])
        with pytest.raises(GGUFError):
            read_gguf(path)


def test_lying_counts(tmp_path, tiny):
    data = bytearray(tiny.read_bytes())
    for offset in (8, 16):
        lie = data.copy()
        lie[offset : offset + 8] = struct.pack("<Q", 2**60)
        (tmp_path / "x.gguf").write_bytes(lie)
        with pytest.raises(GGUFError, match="more than fit"):
            read_gguf(tmp_path / "x.gguf")


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_crash_the_reader(tmp_path, tiny, data):
    """Anything may come out but an error of another type."""
    path = tmp_path / "x.gguf"
    if not path.exists():
        shutil.copy(tiny, path)
    header = read_gguf(tiny).data_start
    places = data.draw(st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), min_size=1, max_size=4))
    with path.open("rb+") as stream:
        original = [(place, tiny.read_bytes()[place]) for place, _ in places]
        for place, value in places:
            stream.seek(place)
            stream.write(bytes([value]))
        stream.flush()
        try:
            read_gguf(path)
        except GGUFError as error:
            assert str(path) in str(error)
        finally:
            for place, value in original:
                stream.seek(place)
                stream.write(bytes([value]))
