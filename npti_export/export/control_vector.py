"""Control vectors in llama.cpp's format: one direction a layer, added to the residual stream behind it.

Keys and names after llama.cpp's tools/cvector-generator and common_control_vector_load: ``general.architecture`` is
``controlvector``, tensors are ``direction.N``, F32 with one dimension, N from 1 on: there is none for the first layer.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npti_export.errors import GGUFError
from npti_export.gguf.reader import CONTROL_VECTOR, DEFAULT_ALIGNMENT, is_control_vector, read_gguf
from npti_export.gguf.weights import read_vector
from npti_export.gguf.writer import NewTensor, Value, encode_header, encode_uint32, encode_value, lay_out

_VERSION, _F32 = 3, 0
Floats = npt.NDArray[np.float32]


def write_control_vector(path: Path, directions: Floats, model: str, metadata: dict[str, Value]) -> int:
    """Write ``directions`` ``[layers - 1, hidden]``, for the second layer on.

    Args:
        path: the file.
        directions: finite float32.
        model: the model's ``general.architecture``.
        metadata: added under ``npti.``.

    Returns:
        Its size in bytes.
    """
    layers, hidden = directions.shape
    keys = [
        ("general.architecture", encode_value(CONTROL_VECTOR)),
        (f"{CONTROL_VECTOR}.model_hint", encode_value(model)),
        (f"{CONTROL_VECTOR}.layer_count", encode_uint32(layers)),
        *((f"npti.{key}", encode_value(value)) for key, value in metadata.items()),
    ]
    tensors = [NewTensor(f"direction.{layer + 1}", (hidden,), _F32, 4 * hidden) for layer in range(layers)]
    placed = lay_out(tensors, DEFAULT_ALIGNMENT)
    data = bytearray(placed[-1].offset + -(-4 * hidden // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT)
    for tensor, direction in zip(placed, directions.astype("<f4"), strict=True):
        data[tensor.offset : tensor.offset + tensor.nbytes] = direction.tobytes()
    return path.write_bytes(encode_header(_VERSION, keys, placed, DEFAULT_ALIGNMENT) + data)


def read_directions(path: Path, layers: int, hidden: int) -> Floats:
    """``[layers - 1, hidden]`` float32 of a control vector for a model of these sizes; zeros where it says nothing.

    Raises:
        GGUFError: not a control vector, for other sizes, or with values that are not finite.
    """
    header = read_gguf(path)
    if not is_control_vector(header):
        raise GGUFError(f"{path}: is not a control vector of llama.cpp")
    directions = np.zeros((layers - 1, hidden), np.float32)
    for tensor in header.tensors:
        stem, _, number = tensor.name.partition(".")
        layer = int(number) if stem == "direction" and re.fullmatch("[0-9]{1,6}", number) else 0
        if tensor.type_id != _F32:
            raise GGUFError(f"{path}: {tensor.name} is not F32, which llama.cpp does not take; make it again")
        if not 1 <= layer < layers or tensor.shape != (hidden,):
            raise GGUFError(
                f"{path}: {tensor.name} {tensor.shape} does not fit a model of {layers} layers of size {hidden}; "
                "take the control vector of this model"
            )
        directions[layer - 1] = read_vector(header, tensor)
    if not np.isfinite(directions).all():
        raise GGUFError(f"{path}: holds values that are not finite; make it again")
    return directions
