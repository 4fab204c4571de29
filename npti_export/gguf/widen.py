"""Widen the three tensors of an MLP, streaming, without changing a byte of what is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from npti_export.compiler.program import OFF_BIAS, Floats, Indices, LayerProgram
from npti_export.gguf.blocks import Bytes, decode_columns, quantise, scale_rows
from npti_export.gguf.reader import TensorInfo

CHUNK = 4 << 20  # bytes read at once


def copy(stream: BinaryIO, tensor: TensorInfo) -> Iterator[bytes]:
    """The tensor's bytes."""
    stream.seek(tensor.offset)
    left = tensor.nbytes
    while left:
        data = stream.read(min(CHUNK, left))
        if not data:
            raise EOFError(tensor.name)
        left -= len(data)
        yield data


def append_rows(stream: BinaryIO, tensor: TensorInfo, source: Indices, factors: Floats) -> Iterator[bytes]:
    """A gate or up projection: its bytes, then row ``source[u]`` times ``factors[u]`` for each unit."""
    yield from copy(stream, tensor)
    rows = np.zeros((len(source), tensor.row_bytes), np.uint8)
    for place in np.flatnonzero(factors):
        stream.seek(tensor.offset + int(source[place]) * tensor.row_bytes)
        rows[place] = np.frombuffer(stream.read(tensor.row_bytes), np.uint8)
    yield scale_rows(rows, factors, tensor.type_id).tobytes()


def append_columns(stream: BinaryIO, tensor: TensorInfo, source: Indices) -> Iterator[bytes]:
    """A down projection: each row's bytes, then new blocks with its columns ``source``, in the tensor's own type."""
    for rows in _row_chunks(stream, tensor):
        added = quantise(decode_columns(rows, source, tensor.type_id), tensor.type_id)
        yield np.concatenate([rows, added], axis=1).tobytes()


def gate_bias(width: int, program: LayerProgram) -> bytes:
    """The gate bias of a widened layer, ``[width + units]`` float32."""
    bias = np.zeros(width, np.float32)
    bias[program.off] = OFF_BIAS
    return np.concatenate([bias, program.gate_bias]).tobytes()


def keep_rows(stream: BinaryIO, tensor: TensorInfo, rows: int) -> Iterator[bytes]:
    """The first ``rows`` rows: undoes :func:`append_rows`."""
    return copy(stream, TensorInfo(tensor.name, tensor.shape, tensor.type_id, tensor.offset, rows * tensor.row_bytes))


def keep_columns(stream: BinaryIO, tensor: TensorInfo, row_bytes: int) -> Iterator[bytes]:
    """The first ``row_bytes`` bytes of each row: undoes :func:`append_columns`."""
    for rows in _row_chunks(stream, tensor):
        yield rows[:, :row_bytes].tobytes()


def _row_chunks(stream: BinaryIO, tensor: TensorInfo) -> Iterator[Bytes]:
    per_chunk = max(1, CHUNK // tensor.row_bytes)
    for start in range(0, tensor.rows, per_chunk):
        count = min(per_chunk, tensor.rows - start)
        stream.seek(tensor.offset + start * tensor.row_bytes)
        data = np.frombuffer(stream.read(count * tensor.row_bytes), np.uint8)
        yield data.reshape(count, tensor.row_bytes)
