"""Quantised blocks: scale rows without touching their integers, read single columns, quantise new columns.

A quantised row is a sequence of blocks, each with one or two f16 scales. Rows are scaled by multiplying
those; columns are new blocks in the tensor's own type. Byte layouts from ggml-common.h.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from npti_export.errors import GGUFError

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
}
_FLOATS = ("F32", "F16", "BF16")


@cache
def type_name(type_id: int) -> str:
    """The ggml name of a tensor type, such as ``Q4_1``."""
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(type_id).name)


@cache
def type_id_of(name: str) -> int:
    """The id of a ggml type name."""
    from gguf.constants import GGMLQuantizationType

    return int(GGMLQuantizationType[name])


@cache
def _sizes() -> dict[int, tuple[int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (int(block), int(nbytes)) for kind, (block, nbytes) in GGML_QUANT_SIZES.items()}


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
    return is_float(type_id) or type_name(type_id) in _SCALE_OFFSETS


def scale_rows(rows: Bytes, factors: Floats, type_id: int) -> Bytes:
    """Multiply each row by its own factor.

    Args:
        rows: ``[R, row bytes]`` uint8, encoded rows of one tensor.
        factors: ``[R]`` float32.
        type_id: the tensor's ggml type.

    Returns:
        ``[R, row bytes]`` uint8. Rows whose factor is 1 are byte-identical, rows whose factor is 0 decode to
        exact zeros; for the others only floats and f16 block scales change, rounded to nearest.
    """
    name = type_name(type_id)
    result = rows.copy()
    if name in _FLOATS:
        values = decode(rows, type_id)
        result[:] = quantise(values * factors[:, None], type_id)
        result[factors == 1] = rows[factors == 1]
    else:
        _, nbytes = _sizes()[type_id]
        blocks = result.reshape(len(rows), rows.shape[1] // nbytes, nbytes)
        for offset in _SCALE_OFFSETS[name]:
            scales = np.ascontiguousarray(blocks[:, :, offset : offset + 2]).view(np.float16)[..., 0]
            scaled = (scales.astype(np.float32) * factors[:, None]).astype(np.float16)
            blocks[:, :, offset : offset + 2] = scaled[..., None].view(np.uint8)
    result[factors == 0] = 0  # all-zero bytes decode to zero in every type of the table
    return result


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
    function = getattr(_ggml(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    function(ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(result.ctypes.data), ctypes.c_int64(result.size))
    return result


def decode_columns(rows: Bytes, columns: npt.NDArray[np.int64], type_id: int) -> Floats:
    """Decode single columns ``[C]`` of rows ``[R, row bytes]`` to ``[R, C]`` float32, reading only their blocks."""
    block, nbytes = _sizes()[type_id]
    wanted, inverse = np.unique(columns // block, return_inverse=True)
    if len(wanted) * nbytes < rows.shape[1]:
        rows = rows.reshape(len(rows), -1, nbytes)[:, wanted].reshape(len(rows), -1)
    return np.take(decode(rows, type_id), inverse * block + columns % block, axis=1)


def quantise(values: Floats, type_id: int) -> Bytes:
    """Encode ``[R, C]`` float32 (C a multiple of the block) as ``[R, row bytes]`` uint8 in a ggml type, by ggml itself.

    Floats are rounded to nearest, ties to even.

    Raises:
        GGUFError: ggml did not write what it should have.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    block, nbytes = _sizes()[type_id]
    rows, length = values.shape
    result = np.empty((rows, length // block * nbytes), dtype=np.uint8)
    if not result.size:
        return result  # ggml divides by the row length
    # size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix), ggml.h
    written = _ggml().ggml_quantize_chunk(type_id, values.ctypes.data, result.ctypes.data, 0, rows, length, None)
    if written != result.nbytes:
        raise GGUFError(f"ggml wrote {written} bytes of {type_name(type_id)} where {result.nbytes} were due")
    return result


@cache
def _ggml() -> Any:
    """The ggml that llama-cpp-python bundles, without a compiler: its C functions by ctypes."""
    import llama_cpp._ctypes_extensions as loader
    import llama_cpp._ggml as bundled

    library: Any = loader.load_shared_library("ggml-base", bundled.libggml_base_path)
    function = library.ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    return library
