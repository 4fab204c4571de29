"""New columns of a down projection: as near to what is wanted as the tensor's own type allows."""

from __future__ import annotations

from functools import cache

import numpy as np

from npti_export.compiler.program import Indices
from npti_export.gguf.blocks import (
    Bytes,
    Floats,
    block_shape,
    decode,
    has_scales,
    is_float,
    multiply_scales,
    quantise,
    type_name,
)
from npti_export.gguf.reader import GGUFFile

_SUPERBLOCK = 256  # QK_K in ggml-common.h
_ONE_SCALE = ("TQ1_0", "TQ2_0")  # superblocks without scales inside
_FINE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
_INNER = 32  # columns that share a scale inside all other superblocks, or a multiple of it


def granule(type_id: int) -> int:
    """Columns that share a scale: a block, or 32 within the superblocks of K- and I-quants."""
    block, _ = block_shape(type_id, "a down projection")
    return _INNER if block == _SUPERBLOCK and type_name(type_id) not in _ONE_SCALE else block


def is_fine(type_id: int) -> bool:
    """Whether plain rounding is lost in the runtime's own noise, so that corrections would only cost time.

    So it is from four bits on. Measured on the default model (Q4_1), three rules, KL to the rule: 0.0048 to 0.0069
    with corrections, 0.0060 to 0.0064 without, where the runtime's own noise is 0.0051.
    """
    return is_float(type_id) or type_name(type_id) in _FINE


def is_codebook(type_id: int) -> bool:
    """Whether columns are encoded eight at once, as a point of a lattice: the IQ1, IQ2 and IQ3 types."""
    return type_name(type_id).startswith(("IQ1", "IQ2", "IQ3"))


def quantise_columns(wanted: Floats, corrects: Indices | None, type_id: int) -> Bytes:
    """Encode new columns, each correction standing for what quantising lost of another column.

    Corrections share superblocks with what they correct, whose rounding they move a little; so the remainder is taken
    a second time, from the first result. Measured, relative error of columns of a real down projection in Q2_K: 0.26
    without corrections, 0.16 with the first remainder, 0.10 with the second, no less with a third.

    Args:
        wanted: ``[R, C]`` float32, C a multiple of the block; where ``corrects`` says so, ignored.
        corrects: ``[C]`` int64 or None, see :class:`npti_export.compiler.program.LayerProgram`.
        type_id: the ggml type.

    Returns:
        ``[R, row bytes]`` uint8.

    Raises:
        ArithmeticError: see :func:`npti_export.gguf.blocks.quantise`.
    """
    if corrects is None or (corrects < 0).all():
        return quantise(wanted, type_id) if is_fine(type_id) else _nearest(wanted, type_id)
    result = _nearest(wanted, type_id)
    block, nbytes = block_shape(type_id, "a down projection")
    blocks = result.reshape(len(result), -1, nbytes)
    places = np.flatnonzero(corrects >= 0)
    corrected = corrects[places]
    changing = np.unique(places // block)
    target = wanted.copy()
    for _ in range(2 if np.isin(corrected // block, changing).any() else 1):
        target[:, places] = wanted[:, corrected] - decode(result, type_id)[:, corrected]
        chosen = target.reshape(len(target), -1, block)[:, changing].reshape(len(target), -1)
        blocks[:, changing] = _nearest(chosen, type_id).reshape(len(target), -1, nbytes)
    return result


def _nearest(values: Floats, type_id: int) -> Bytes:
    """ggml's blocks with their f16 scales fitted by least squares, where they have such.

    ggml takes the largest value of a block for the scale of TQ1_0, TQ2_0 and Q2_0, which suits a model that was
    trained with that scale and no other (measured error of columns shuffled into other blocks: 0.31, fitted 0.14),
    and multiplies those of the IQ types by constants of its own (IQ1_S 0.41, fitted 0.38).
    """
    block, _ = block_shape(type_id, "a down projection")
    # Measured: even weights take 1% (Q6_K) to 25% (IQ1_M) off the error of superblocks. Smaller blocks gain less from
    # them than from corrections, and would take several times as long to bake.
    encoded = quantise(values, type_id, even=block == _SUPERBLOCK)
    if not has_scales(type_id):
        return encoded
    target = values.reshape(len(values), -1, block)
    found = decode(encoded, type_id).reshape(target.shape)
    energy = np.einsum("rbc,rbc->rb", found, found)
    ratio = np.divide(np.einsum("rbc,rbc->rb", target, found), energy, out=np.ones_like(energy), where=energy > 0)
    return multiply_scales(encoded, ratio, type_id)


def rounding(header: GGUFFile) -> float:
    """Relative error of columns that are like a model's own, in the types of its down projections; 0 for floats.

    The root mean square over normal values and over layers, as each layer may have a type of its own.
    """
    kinds = [tensor.type_id for tensor in header.tensors if tensor.name.endswith("ffn_down.weight")]
    errors = [0.0 if is_float(kind) else _rounding_of(kind) for kind in kinds]
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0


@cache
def _rounding_of(type_id: int) -> float:
    values = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    rounded = decode(quantise_columns(values, None, type_id), type_id)
    return float(np.sqrt(np.square(rounded - values).mean() / np.square(values).mean()))
