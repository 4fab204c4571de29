"""Widen the three tensors of an MLP, streaming, without changing a byte of what is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from npti_export.compiler.program import OFF_BIAS, Floats, Indices, LayerProgram
from npti_export.errors import GGUFError
from npti_export.gguf.blocks import Bytes, block_shape, decode_columns, scale_rows
from npti_export.gguf.columns import quantise_columns
from npti_export.gguf.reader import TensorInfo

CHUNK = 4 << 20  # bytes read at once
_ZEROS = memoryview(bytes(1 << 20))


@dataclass(frozen=True)
class Range:
    """Bytes to be copied from the source file as they are; the writer lets the kernel do it where it can."""

    offset: int
    nbytes: int


Data = bytes | memoryview
Piece = Range | Data


def copy(tensor: TensorInfo) -> Iterator[Piece]:
    """The tensor's bytes."""
    yield Range(tensor.offset, tensor.nbytes)


def zeros(count: int) -> Iterator[Piece]:
    """So many zero bytes, from one small block: there may be many gaps, each as long as the alignment."""
    for start in range(0, count, len(_ZEROS)):
        yield _ZEROS[: count - start]


def append_rows(
    stream: BinaryIO, tensor: TensorInfo, source: Indices, factors: Floats, dense: Floats
) -> Iterator[Piece]:
    """A gate or up projection: its bytes, row ``source[u]`` times ``factors[u]`` for each unit, then rows of their own.

    Args:
        stream: the file.
        tensor: the projection.
        source: ``[units]`` int64.
        factors: ``[units]`` float32.
        dense: ``[R, hidden]`` float32, which are encoded in the tensor's type.

    Raises:
        GGUFError: a row is not finite, or too large for the type.
    """
    yield Range(tensor.offset, tensor.nbytes)
    row_bytes, wanted = tensor.row_bytes, factors != 0
    if tensor.nbytes <= CHUNK:
        stream.seek(tensor.offset)
        read = _read(stream, tensor.nbytes).reshape(-1, row_bytes)[source[wanted]]
    else:
        read = np.empty((np.count_nonzero(wanted), row_bytes), np.uint8)
        for row, neuron in zip(read, source[wanted].tolist(), strict=True):
            stream.seek(tensor.offset + neuron * row_bytes)
            row[:] = _read(stream, row_bytes)
    rows = np.zeros((len(source) + len(dense), row_bytes), np.uint8)
    own, filled = rows[len(source) :], dense.any(axis=1)
    with _naming(stream, tensor):
        rows[: len(source)][wanted] = scale_rows(read, factors[wanted], tensor.type_id)
        if filled.any():
            own[filled] = quantise_columns(dense[filled], None, tensor.type_id)  # all-zero bytes decode to zero
    yield rows.data


def append_columns(stream: BinaryIO, tensor: TensorInfo, layer: LayerProgram) -> Iterator[Piece]:
    """A down projection: each row's bytes, then new blocks with its columns ``source`` and those of dense units.

    They are in the tensor's own type.

    Those of a silent layer are all-zero bytes, which decode to zero in every type.

    Raises:
        GGUFError: a column is not finite, or too large for the type.
    """
    done = 0
    block, nbytes = block_shape(tensor.type_id, tensor.name)
    for rows in row_chunks(stream, tensor):
        if layer.silent:
            added = np.zeros((len(rows), layer.units // block * nbytes), np.uint8)
            yield np.concatenate([rows, added], axis=1).data
            continue
        with _naming(stream, tensor):
            wanted = decode_columns(rows, layer.source, tensor.type_id)
            if layer.dense is not None:
                wanted = np.concatenate([wanted, layer.dense.down[done : done + len(rows)]], axis=1)
            done += len(rows)
            if not np.isfinite(wanted).all():  # floats would take it as it is
                raise ArithmeticError("a column is not finite")
            added = quantise_columns(wanted, layer.corrects, tensor.type_id)
        yield np.concatenate([rows, added], axis=1).data


@contextmanager
def _naming(stream: BinaryIO, tensor: TensorInfo) -> Iterator[None]:
    """Say in which tensor of which file the arithmetic went wrong."""
    try:
        yield
    except ArithmeticError as error:
        raise GGUFError(
            f"{stream.name}: {tensor.name}: {error}; the file is damaged or ill-conditioned, take another copy or type"
        ) from error


def reorder_rows(stream: BinaryIO, tensor: TensorInfo, order: Indices) -> Iterator[Piece]:
    """Rows (of a vector: elements) in another order: in each group of ``len(order)`` row ``i`` is row ``order[i]``."""
    count, group = tensor.shape[-1], len(order)
    row_bytes = tensor.nbytes // count
    per_chunk = max(1, CHUNK // (row_bytes * group)) * group
    for start in range(0, count, per_chunk):
        rows = min(per_chunk, count - start)
        stream.seek(tensor.offset + start * row_bytes)
        yield np.ascontiguousarray(_read(stream, rows * row_bytes).reshape(-1, group, row_bytes)[:, order]).data


def gate_bias(width: int, program: LayerProgram, old: Floats | None = None) -> Floats:
    """The gate bias of a widened layer, ``[width + units]`` float32; ``old`` is the base's, ``[width]``.

    Unit ``u`` copies ``gate_scale[u]`` times a gate, so also times the gate's own bias.
    """
    bias = np.zeros(width, np.float32) if old is None else old.copy()
    units = program.gate_bias if old is None else program.gate_bias + program.gate_scale * old[program.source]
    bias[program.biased] += program.bias
    bias[program.off] = OFF_BIAS
    dense = [] if program.dense is None else [program.dense.gate_bias]
    return np.concatenate([bias, units, *dense]).astype(np.float32)


def up_bias(program: LayerProgram, old: Floats) -> Floats:
    """The up bias of a widened layer that had one, ``[width + units]`` float32; dense units have none."""
    dense = np.zeros(program.units - program.copied, np.float32)
    return np.concatenate([old, program.up_scale * old[program.source], dense])


def read_floats(stream: BinaryIO, tensor: TensorInfo) -> Floats:
    """A vector of float32, as a copy."""
    stream.seek(tensor.offset)
    return _read(stream, tensor.nbytes).view(np.float32).copy()


def keep_bytes(tensor: TensorInfo, nbytes: int) -> Iterator[Piece]:
    """The first bytes: undoes :func:`append_rows`."""
    yield Range(tensor.offset, nbytes)


def keep_columns(stream: BinaryIO, tensor: TensorInfo, row_bytes: int) -> Iterator[Piece]:
    """The first ``row_bytes`` bytes of each row: undoes :func:`append_columns`."""
    for rows in row_chunks(stream, tensor):
        yield np.ascontiguousarray(rows[:, :row_bytes]).data


def row_chunks(stream: BinaryIO, tensor: TensorInfo) -> Iterator[Bytes]:
    """The rows of a tensor from the first to the last, ``[rows, row bytes]`` uint8, :data:`CHUNK` bytes at a time."""
    row_bytes = tensor.row_bytes
    per_chunk = max(1, CHUNK // row_bytes)
    for start in range(0, tensor.rows, per_chunk):
        count = min(per_chunk, tensor.rows - start)
        stream.seek(tensor.offset + start * row_bytes)  # whoever takes the chunks may move the stream meanwhile
        yield _read(stream, count * row_bytes).reshape(count, row_bytes)


def _read(stream: BinaryIO, count: int) -> Bytes:
    data = np.frombuffer(stream.read(count), np.uint8)
    if len(data) != count:
        raise EOFError("the file ended early")
    return data


def write_pieces(source: BinaryIO, target: BinaryIO, pieces: Iterable[Piece]) -> None:
    """Write what the functions above yield. ``target`` must be unbuffered.

    Raises:
        EOFError: the source ended early.
    """
    for piece in _joined(pieces):
        if isinstance(piece, Range):
            _copy_range(source, target, piece)
        elif piece:
            _write_all(target, memoryview(piece).cast("B"))


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, with ranges that continue each other in the source made one."""
    held: Range | None = None
    for piece in pieces:
        if held is None:
            pass
        elif isinstance(piece, Range) and held.offset + held.nbytes == piece.offset:
            piece = Range(held.offset, held.nbytes + piece.nbytes)
        else:
            yield held
        held = piece if isinstance(piece, Range) else None
        if held is None:
            yield piece
    if held is not None:
        yield held


def _copy_range(source: BinaryIO, target: BinaryIO, piece: Range) -> None:
    position, end = piece.offset, piece.offset + piece.nbytes
    if hasattr(os, "copy_file_range"):
        try:
            while position < end:
                done = os.copy_file_range(source.fileno(), target.fileno(), min(end - position, 1 << 30), position)
                if not done:
                    raise EOFError("the file ended early")
                position += done
        except OSError as error:
            # Not between these two file systems: the loop below does the rest. Anything else is a real failure.
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
    source.seek(position)
    while position < end:
        data = source.read(min(CHUNK, end - position))
        if not data:
            raise EOFError("the file ended early")
        _write_all(target, memoryview(data))
        position += len(data)


def _write_all(target: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[target.write(data) :]
