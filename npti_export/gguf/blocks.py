"""Quantised blocks: scale rows without touching their integers, read single columns, quantise new ones.

A quantised row is a sequence of blocks. Most types give each one or two f16 scales, and a row is multiplied by
multiplying those; the rest (MXFP4, NVFP4) are handled here too, see :func:`scale_rows`. Byte layouts from
ggml-common.h, whose every type that ``ggml_quantize_chunk`` writes is here.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from npti_export.errors import GGUFError
from npti_export.gguf.ggml import ggml

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# type name -> byte offsets, inside a block, of the f16 values that scale the whole block (ggml-common.h)
_SCALE_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ2_S": (0,),
    "IQ2_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ1_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}
# IQ1_M keeps the four nibbles of its one f16 scale in the tops of four 16-bit words, lowest first.
_IQ1_M_WORDS = 48
_IQ1_M_SHIFTS = np.array([12, 8, 4, 0], np.uint16)
_IQ1_M_MASKS = np.array([0x000F, 0x00F0, 0x0F00, 0xF000], np.uint16)
_OTHERS = ("IQ1_M", "MXFP4", "NVFP4")
_FLOATS = ("F32", "F16", "BF16")
# type id -> name, elements and bytes of a block, of types that ggml has and gguf-py has not (ggml.h, ggml-common.h)
_NEWER = {42: ("Q2_0", 64, 18)}
# ggml cannot quantise to these without an importance matrix: it aborts the process (ggml_quantize_requires_imatrix)
_NEED_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
# Larger weights overflow an f16 scale, and their powers float32 inside ggml, which then aborts or writes infinities.
_LARGEST = 65504.0
# Smaller ones give a type without f16 scales (MXFP4) an exponent below its range, which ggml wraps around.
_SMALLEST = 2.0**-100


@cache
def type_name(type_id: int) -> str:
    """The ggml name of a tensor type, such as ``Q4_1``.

    Raises:
        GGUFError: there is no such type, as far as this version knows.
    """
    from gguf.constants import GGMLQuantizationType

    if type_id in _NEWER:
        return _NEWER[type_id][0]
    try:
        return str(GGMLQuantizationType(type_id).name)
    except ValueError:
        raise GGUFError(f"unknown tensor type {type_id}; the file is damaged or newer than this tool") from None


@cache
def type_id_of(name: str) -> int:
    """The id of a ggml type name.

    Raises:
        KeyError: there is no such type.
    """
    from gguf.constants import GGMLQuantizationType

    newer = {one[0]: type_id for type_id, one in _NEWER.items()}
    return newer[name] if name in newer else int(GGMLQuantizationType[name])


@cache
def _sizes() -> dict[int, tuple[int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    known = {int(kind): (int(block), int(nbytes)) for kind, (block, nbytes) in GGML_QUANT_SIZES.items()}
    return {**{type_id: (block, nbytes) for type_id, (_, block, nbytes) in _NEWER.items()}, **known}


def block_shape(type_id: int, where: str) -> tuple[int, int]:
    """Elements and bytes of a block.

    Raises:
        GGUFError: ``where`` has a type that this version does not know.
    """
    try:
        return _sizes()[type_id]
    except KeyError:
        raise GGUFError(
            f"{where}: unknown tensor type {type_id}; the file is damaged or newer than this tool"
        ) from None


def is_float(type_id: int) -> bool:
    """Whether values are stored one by one, as F32, F16 or BF16."""
    return type_name(type_id) in _FLOATS


def supports_widening(type_id: int) -> bool:
    """Whether rows of this type can be scaled and new blocks of it written."""
    return is_float(type_id) or type_name(type_id) in (*_SCALE_OFFSETS, *_OTHERS)


def scale_rows(rows: Bytes, factors: Floats, type_id: int) -> Bytes:
    """Multiply each row by its own factor.

    Args:
        rows: ``[R, row bytes]`` uint8, encoded rows of one tensor.
        factors: ``[R]`` float32.
        type_id: the tensor's ggml type.

    Returns:
        ``[R, row bytes]`` uint8. Rows whose factor is 1 are byte-identical, rows whose factor is 0 decode to
        exact zeros. For the others only floats and f16 block scales change, rounded to nearest. MXFP4 scales by
        powers of two and NVFP4's three-bit ones are no finer: MXFP4 rows keep their integers where the factor is a
        power of two (or minus one) and are quantised again elsewhere; NVFP4 rows always are.

    Raises:
        ArithmeticError: a scaled row is not finite, or too large for its type.
    """
    name = type_name(type_id)
    result = rows.copy()
    with np.errstate(over="ignore", invalid="ignore"):  # said below, with a reason
        if name in _FLOATS:
            result[:] = quantise(decode(rows, type_id) * factors[:, None], type_id)
        elif name in _SCALE_OFFSETS or name == "IQ1_M":
            result = multiply_scales(rows, factors[:, None], type_id)
        else:
            again = factors != 0
            if name == "MXFP4":
                again &= ~_shift_exponents(result, factors)
            result[again] = quantise(decode(rows[again], type_id) * factors[again, None], type_id)
    result[factors == 1] = rows[factors == 1]
    result[factors == 0] = 0  # all-zero bytes decode to zero in every type here
    if not np.isfinite(decode(result, type_id)).all():
        raise ArithmeticError(f"a row is not finite once it is scaled in {name}")
    return result


def has_scales(type_id: int) -> bool:
    """Whether blocks of this type have f16 scales, which :func:`multiply_scales` needs."""
    return type_name(type_id) in (*_SCALE_OFFSETS, "IQ1_M")


def multiply_scales(rows: Bytes, factors: Floats, type_id: int) -> Bytes:
    """Rows ``[R, row bytes]`` uint8 with the f16 scales of block ``b`` of row ``r`` times ``factors[r, b]``.

    Args:
        rows: encoded rows of a type that :func:`has_scales`.
        factors: ``[R, blocks]`` or ``[R, 1]`` float32.
        type_id: their ggml type.
    """
    name = type_name(type_id)
    _, nbytes = _sizes()[type_id]
    result = rows.copy()
    blocks = result.reshape(len(rows), rows.shape[1] // nbytes, nbytes)
    if name == "IQ1_M":
        words = np.ascontiguousarray(blocks[:, :, _IQ1_M_WORDS:]).view(np.uint16)
        scale = np.bitwise_or.reduce(words >> _IQ1_M_SHIFTS & _IQ1_M_MASKS, axis=-1).view(np.float16)
        scaled = (scale.astype(np.float32) * factors).astype(np.float16).view(np.uint16)[..., None]
        words = words & 0x0FFF | (scaled & _IQ1_M_MASKS) << _IQ1_M_SHIFTS
        blocks[:, :, _IQ1_M_WORDS:] = words.view(np.uint8)
        return result
    for offset in _SCALE_OFFSETS[name]:
        scales = np.ascontiguousarray(blocks[:, :, offset : offset + 2]).view(np.float16)[..., 0]
        scaled = (scales.astype(np.float32) * factors).astype(np.float16)
        blocks[:, :, offset : offset + 2] = scaled[..., None].view(np.uint8)
    return result


def _shift_exponents(rows: Bytes, factors: Floats) -> npt.NDArray[np.bool_]:
    """Multiply MXFP4 rows in place where that is exact: the factor ± a power of two and no exponent out of range.

    A block is an exponent byte ``e``, standing for ``2^(e-128)``, and 32 indices of four bits, the upper one the sign.

    Returns:
        ``[R]`` bool, which rows were multiplied.
    """
    mantissa, power = np.frexp(np.abs(factors))
    blocks = rows.reshape(len(rows), rows.shape[1] // 17, 17)
    shifted = blocks[:, :, 0].astype(np.int64) + power[:, None] - 1
    done = (mantissa == 0.5) & ((shifted >= 0) & (shifted <= 254)).all(axis=1)
    blocks[done, :, 0] = shifted[done]
    blocks[done & (factors < 0), :, 1:] ^= 0x88
    return np.asarray(done)


def decode(rows: Bytes, type_id: int) -> Floats:
    """Decode rows ``[R, row bytes]`` uint8 to ``[R, row length]`` float32, by ggml's own C code."""
    rows = np.ascontiguousarray(rows)
    name = type_name(type_id)
    if name == "F32":
        return rows.view(np.float32)
    if name == "F16":
        return rows.view(np.float16).astype(np.float32)
    if name == "BF16":  # the upper half of a float32
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    block, nbytes = _sizes()[type_id]
    result = np.empty((len(rows), rows.shape[1] // nbytes * block), np.float32)
    # void dequantize_row_<type>(const block_<type> * x, float * y, int64_t k), ggml-quants.h
    function = getattr(ggml(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    function(ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(result.ctypes.data), ctypes.c_int64(result.size))
    return result


def decode_columns(rows: Bytes, columns: npt.NDArray[np.int64], type_id: int) -> Floats:
    """Decode single columns ``[C]`` of rows ``[R, row bytes]`` to ``[R, C]`` float32, reading only their blocks."""
    block, nbytes = _sizes()[type_id]
    wanted, inverse = np.unique(columns // block, return_inverse=True)
    if len(wanted) * nbytes < rows.shape[1]:
        rows = rows.reshape(len(rows), -1, nbytes)[:, wanted].reshape(len(rows), -1)
    return np.take(decode(rows, type_id), inverse * block + columns % block, axis=1)


def quantise(values: Floats, type_id: int, *, even: bool = False) -> Bytes:
    """Encode ``[R, C]`` float32 (C a multiple of the block) as ``[R, row bytes]`` uint8 in a ggml type, by ggml itself.

    Floats are rounded to nearest, ties to even.

    Args:
        values: what to encode.
        type_id: the ggml type.
        even: give ggml an importance matrix of ones, so that it minimises the squared error of a block with weights
            ``sqrt(mean x² + x²)`` rather than those it has for want of a matrix (``x²`` in many types). Types that
            cannot do without a matrix get this one always.

    Raises:
        ArithmeticError: a value is not finite, or too large for a quantised type. Handed to ggml, those are what
            makes it abort the process: NaN fits no point of a codebook.
        GGUFError: ggml did not write what it should have.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    block, nbytes = _sizes()[type_id]
    rows, length = values.shape
    name = type_name(type_id)
    importance = None
    if name not in _FLOATS:
        size = np.abs(values)
        if not (size <= _LARGEST).all():  # also where it is NaN
            raise ArithmeticError(f"a weight is not finite, or too large for {name}")
        if ((size > 0) & (size < _SMALLEST)).any():
            values = np.where(size < _SMALLEST, np.float32(0), values)
        if even or name in _NEED_IMPORTANCE:
            importance = np.ones(length, np.float32)
    result = np.empty((rows, length // block * nbytes), dtype=np.uint8)
    if not result.size:
        return result  # ggml divides by the row length
    # size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix), ggml.h; sets up its own tables
    written = ggml().ggml_quantize_chunk(
        type_id,
        values.ctypes.data,
        result.ctypes.data,
        0,
        rows,
        length,
        None if importance is None else importance.ctypes.data,
    )
    if written != result.nbytes:
        raise GGUFError(f"ggml wrote {written} bytes of {name} where {result.nbytes} were due")
    return result
