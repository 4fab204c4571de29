"""Reading tensors of a model, from whichever of its files has them."""

from __future__ import annotations

import numpy as np

from npti_export.errors import GGUFError
from npti_export.files import naming
from npti_export.gguf.blocks import Bytes, Floats, decode
from npti_export.gguf.reader import GGUFFile, TensorInfo


def read_rows(header: GGUFFile, tensor: TensorInfo, start: int, end: int) -> Bytes:
    """Encoded rows ``[end - start, row bytes]`` of a tensor of the model.

    Raises:
        GGUFError: its file has become shorter.
    """
    path, size = header.holder(tensor.name).path, (end - start) * tensor.row_bytes
    with naming(path), path.open("rb") as stream:
        stream.seek(tensor.offset + start * tensor.row_bytes)
        data = stream.read(size)
    if len(data) != size:
        raise GGUFError(f"{path}: became shorter while it was read ({tensor.name}); see whether it is still whole")
    return np.frombuffer(data, np.uint8).reshape(end - start, tensor.row_bytes)


def read_vector(header: GGUFFile, tensor: TensorInfo) -> Floats:
    """The float32 values of a tensor with one dimension."""
    values: Floats = decode(read_rows(header, tensor, 0, 1), tensor.type_id)[0]
    return values


def read_matrix(header: GGUFFile, name: str) -> Floats:
    """The float32 values ``[rows, row length]`` of a tensor with two dimensions.

    Raises:
        GGUFError: there is no such tensor.
    """
    tensor = header.require_tensor(name)
    return decode(read_rows(header, tensor, 0, tensor.rows), tensor.type_id)
