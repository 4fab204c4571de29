"""Reading headers and handling blocks, against gguf-py and ggml. New columns: test_columns.py."""

import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Q2_0, plain_dequantize
from tolerances import F16_SCALE, MXFP4_AGAIN, NVFP4_AGAIN

from npti_export.errors import GGUFError
from npti_export.gguf.blocks import (
    _OTHERS,
    _SCALE_OFFSETS,
    block_shape,
    decode,
    decode_columns,
    quantise,
    scale_rows,
    supports_widening,
    type_id_of,
    type_name,
)
from npti_export.gguf.reader import read_gguf

TYPES = ["F32", "F16", "BF16", *_SCALE_OFFSETS, *_OTHERS]
COARSE = ["MXFP4", "NVFP4"]  # without an f16 scale


def independent(rows, name):
    """Decoded by gguf-py, or plainly where it cannot."""
    return plain_dequantize(rows, Q2_0 if name == "Q2_0" else GGMLQuantizationType[name])


def ggml():
    """ggml's own description of its types."""
    import ctypes

    from npti_export.gguf.ggml import ggml as bundled

    library = bundled()
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    return library


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
def test_blocks_are_what_ggml_says(name):
    kind = type_id_of(name)
    shape = ggml().ggml_blck_size(kind), ggml().ggml_type_size(kind)
    assert block_shape(kind, name) == shape
    assert ggml().ggml_type_name(kind).decode().upper() == type_name(kind) == name
    assert all(offset + 2 <= shape[1] for offset in _SCALE_OFFSETS.get(name, ()))


def test_every_type_that_ggml_can_quantise_to_is_widened():
    """All of GGML_TYPE_*, but for integers, F64, and the two that ggml has for activations only."""
    names = {ggml().ggml_type_name(kind).decode().upper() for kind in range(43)} - {"NONE"}
    names = {name for name in names if not name.startswith(("DEPRECATED", "TYPE_", "I8", "I16", "I32", "I64", "F64"))}
    unknown = {name for name in names - {"Q8_1", "Q8_K"} if not supports_widening(type_id_of(name))}
    assert unknown == set()
    assert len(names) == len(TYPES) + 2


def test_unknown_types_are_named():
    with pytest.raises(GGUFError, match=r"x.gguf: unknown tensor type 43; the file is damaged or newer"):
        block_shape(43, "x.gguf")
    with pytest.raises(GGUFError, match="unknown tensor type 77; the file is damaged or newer"):
        type_name(77)
    assert not supports_widening(type_id_of("I32"))


@pytest.mark.parametrize("name", [name for name in TYPES if name not in COARSE])
def test_scaled_rows(name):
    """Dequantised by gguf-py: factor 1 keeps the bytes, 0 gives zeros, others scale every value within one rounding."""
    kind = type_id_of(name)
    rows = quantise(random_rows(), kind)
    factors = np.array([1, 0, 2, -1, 0.25, -0.0485], np.float32)
    scaled = scale_rows(rows, factors, kind)
    before, after = (independent(one, name).astype(float) for one in (rows, scaled))
    np.testing.assert_array_equal(scaled[0], rows[0])
    assert (after[1] == 0).all()
    exact = 0 if name != "BF16" else 2.0**-8
    for row in (2, 3, 4):  # powers of two round nothing
        np.testing.assert_allclose(after[row], before[row] * factors[row], rtol=exact, atol=1e-7)
    scale = np.abs(before[5]).max() * abs(factors[5])
    tolerance = {"F32": 1e-7, "BF16": 2.0**-8}.get(name, F16_SCALE)
    assert np.abs(after[5] - before[5] * factors[5]).max() <= 2 * tolerance * scale
    assert np.abs(after[5]).max() > 0.5 * scale


@pytest.mark.parametrize(("name", "tolerance"), [("MXFP4", MXFP4_AGAIN), ("NVFP4", NVFP4_AGAIN)])
def test_scaled_rows_without_f16_scales(name, tolerance):
    """As above; powers of two round nothing in MXFP4, everything else is quantised again."""
    kind = type_id_of(name)
    rows = quantise(random_rows(), kind)
    factors = np.array([1, 0, 2, -1, 0.25, -0.485], np.float32)
    scaled = scale_rows(rows, factors, kind)
    before, after = (independent(one, name).astype(float) for one in (rows, scaled))
    np.testing.assert_array_equal(scaled[0], rows[0])
    assert (after[1] == 0).all()
    for row in (2, 3, 4, 5):
        want = before[row] * factors[row]
        error = np.linalg.norm(after[row] - want) / np.linalg.norm(want)
        assert error <= (0 if name == "MXFP4" and row != 5 else tolerance)


def test_mxfp4_exponents_out_of_range():
    """A block so small that its exponent cannot be lowered is quantised again, to zeros."""
    rows = np.zeros((1, 17), np.uint8)
    rows[0] = [3, *[0x21] * 16]  # 2^(3-128) times 1 and 2
    kind = type_id_of("MXFP4")
    assert independent(rows, "MXFP4").max() > 0
    lowered = scale_rows(rows, np.array([2.0**-3], np.float32), kind)
    assert lowered[0, 0] == 0
    assert (lowered[0, 1:] == rows[0, 1:]).all()
    assert (independent(scale_rows(rows, np.array([2.0**-4], np.float32), kind), "MXFP4") == 0).all()


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("F32", "BF16", "MXFP4", "NVFP4")])
def test_scales_out_of_range_are_refused(name):
    rows = quantise(random_rows(1) * 8000, type_id_of(name))
    with pytest.raises(ArithmeticError, match=rf"not finite once it is scaled in {name}|too large for {name}"):
        scale_rows(rows, np.array([2.0**30], np.float32), type_id_of(name))


@pytest.mark.parametrize("name", TYPES[3:])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_values_that_would_abort_ggml_are_refused(name, bad):
    values = random_rows(2)
    values[1, 300] = bad
    with pytest.raises(ArithmeticError, match=f"not finite, or too large for {name}"):
        quantise(values, type_id_of(name))


EXTREMES = """
import numpy as np
from npti_export.gguf.blocks import decode, quantise, type_id_of
rng = np.random.default_rng(0)
plain = rng.normal(size=(2, 512)).astype(np.float32)
spike = np.zeros((2, 512), np.float32)
spike[0, ::70], spike[1, 100] = 10.0 ** np.arange(-30, 10, 5), 65504
scales = (1e-45, 1e-38, 1e-30, 1e-20, 1e-15, 1e-12, 1e-10, 1e-8, 1e-7, 1e-4, 1e4)
cases = [plain * np.float32(scale) for scale in scales]
cases += [spike, np.zeros((2, 512), np.float32), np.full((2, 512), -0.25, np.float32), np.full((2, 512), 65504.0)]
cases += [np.sign(plain), np.repeat(plain[:, :64], 8, axis=1), np.where(plain > 1, plain, 0)]
cases += [plain * np.exp(4 * rng.normal(size=plain.shape)), np.where(rng.random(plain.shape) < 0.5, 1e-9, plain)]
cases += [np.where(np.arange(512) < 32, 1e-12, plain), np.abs(plain), -np.abs(plain), 65504 * np.sign(plain)]
for name in NAMES:
    for case in cases:
        for even in (False, True):
            encoded = quantise(np.clip(case, -65504, 65504), type_id_of(name), even=even)
            found = decode(encoded, type_id_of(name))
            assert np.isfinite(found).all(), name
            if not np.any(case):
                assert (found == 0).all(), name
print("survived")
"""


@pytest.mark.parametrize("names", [TYPES[3:]])
def test_nothing_else_aborts_ggml(names):
    """Zeros, denormals, single spikes, the largest weights: in another process, as an abort would end this one."""
    done = subprocess.run(
        [sys.executable, "-c", EXTREMES.replace("NAMES", repr(names))], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "survived", done.stderr[-2000:]


@pytest.mark.parametrize("name", TYPES)
def test_single_columns(name):
    kind = type_id_of(name)
    rows = quantise(random_rows(), kind)
    columns = np.array([511, 0, 33, 33, 256, 31])
    np.testing.assert_array_equal(decode_columns(rows, columns, kind), decode(rows, kind)[:, columns])


@pytest.mark.parametrize("name", TYPES)
def test_decoded_like_gguf_py(name):
    rows = quantise(random_rows(), type_id_of(name))
    np.testing.assert_allclose(decode(rows, type_id_of(name)), independent(rows, name), rtol=1e-6)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
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
