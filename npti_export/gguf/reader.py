"""Read the header of a GGUF file: keys kept as raw bytes, tensors as places in the file.

Layout after the GGUF specification (ggml docs/gguf.md), versions 2 and 3, little-endian. Nothing is
memory-mapped, so that reading a header never counts the weights as used memory. Every count and length
is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import io
import itertools
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from npti_export.errors import GGUFError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# value type -> struct format; ggml docs/gguf.md, gguf_metadata_value_type
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMS = 4


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry: ``raw`` is its exact encoding, type tag included, key excluded; it lies at ``position``."""

    key: str
    raw: bytes
    position: int

    @cached_property
    def value(self) -> Any:
        """The decoded value: a Python scalar, a string or a list of these."""
        cursor = _Cursor(io.BytesIO(self.raw), len(self.raw), self.key)
        return _decode(cursor, cursor.scalar("I"))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: ``shape`` as GGUF gives it (row length first), ``offset`` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int

    @property
    def row_length(self) -> int:
        """Elements in a row (ne[0])."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows (the product of the other dimensions)."""
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes in a row."""
        return self.nbytes // self.rows


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file.

    Of a model split into several files (see :func:`npti_export.gguf.shards.read_model`) it has the path and the keys of
    the first, the tensors of all, whose offsets count in their own file, and those files in ``shards``.
    """

    path: Path
    version: int
    keys: tuple[KeyValue, ...]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int
    size: int
    shards: tuple[GGUFFile, ...] = ()

    @property
    def parts(self) -> tuple[GGUFFile, ...]:
        """The files that it consists of, each with its own tensors."""
        return self.shards or (self,)

    def holder(self, name: str) -> GGUFFile:
        """The file of the model that has a tensor.

        Raises:
            GGUFError: none has.
        """
        self.require_tensor(name)
        return next(part for part in self.parts if name in part.by_name)

    @cached_property
    def by_key(self) -> dict[str, KeyValue]:
        """Metadata entries by key."""
        return {entry.key: entry for entry in self.keys}

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        """Tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The decoded value of a key, or ``default``."""
        entry = self.by_key.get(key)
        return default if entry is None else entry.value

    def require_int(self, key: str) -> int:
        """The value of a key that must be there and be a positive integer.

        Raises:
            GGUFError: missing, or something else.
        """
        value = self.get(key)
        if isinstance(value, list):
            raise GGUFError(f"{self.path}: {key} is an array, one value a layer, which is not supported")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise GGUFError(
                f"{self.path}: metadata key {key} is missing or not a positive integer; the file is damaged"
            )
        return value

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            GGUFError: the key is missing.
        """
        value = self.get("general.architecture")
        if not isinstance(value, str):
            raise GGUFError(f"{self.path}: general.architecture is missing; this is not a language model")
        return value

    def require_tensor(self, name: str) -> TensorInfo:
        """The tensor of that name.

        Raises:
            GGUFError: there is none.
        """
        try:
            return self.by_name[name]
        except KeyError:
            raise GGUFError(f"{self.path}: tensor {name} is missing; the file is incomplete") from None


def mlp_widths(header: GGUFFile) -> list[int]:
    """Neurons of each layer's MLP: llama.cpp reads one number for all, or an array with one a layer, which may be 0.

    Raises:
        GGUFError: neither.
    """
    layers = header.require_int(f"{header.architecture}.block_count")
    key = f"{header.architecture}.feed_forward_length"
    value = header.get(key)
    if not isinstance(value, list):
        return [header.require_int(key)] * layers
    if len(value) != layers or not all(isinstance(one, int) and one >= 0 for one in value) or not any(value):
        raise GGUFError(f"{header.path}: {key} is not one width for each of {layers} layers; the file is damaged")
    return value


_LENGTH = struct.Struct("<Q")
_READ_AHEAD = 1 << 20


class _Cursor:
    """Bounds-checked reads from the front of a binary stream, buffered as far as it was read."""

    def __init__(self, stream: BinaryIO, size: int, name: str) -> None:
        self.stream, self.size, self.name, self.position = stream, size, name, 0
        self.data = b""

    def need(self, count: int) -> None:
        """Make ``count`` more bytes available, or raise."""
        end = self.position + count
        if end > self.size:
            raise self.truncated()
        while len(self.data) < end:
            more = self.stream.read(max(end - len(self.data), _READ_AHEAD, len(self.data)))
            if not more:
                raise self.truncated()
            self.data += more

    def take(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return self.data[self.position - count : self.position]

    def skip_strings(self, count: int) -> None:
        """Go past ``count`` strings: the longest loop over a header by far, so it is spelt out."""
        position, available, unpack = self.position, len(self.data), _LENGTH.unpack_from
        for _ in range(count):
            if position + 8 > available:
                self.position = position
                self.need(8)
                available = len(self.data)
            position += 8 + unpack(self.data, position)[0]
            if position > self.size:
                raise self.truncated()
        self.position = position
        self.need(0)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(
                f"{self.name}: a string near byte {self.position} is not UTF-8; the file is damaged"
            ) from error

    def truncated(self) -> GGUFError:
        return GGUFError(f"{self.name}: truncated near byte {self.position}; download or copy the file again")


def read_gguf(path: Path) -> GGUFFile:
    """Read a GGUF header and check it against the file's size.

    Raises:
        GGUFError: missing, not GGUF, unsupported version or byte order, truncated or inconsistent.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            return parse_gguf(stream, size, path)
    except FileNotFoundError:
        raise GGUFError(f"{path}: there is no such file") from None
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read ({error.strerror})") from error


def parse_gguf(stream: BinaryIO, size: int, path: Path) -> GGUFFile:
    """Read a header from a stream of which at least the header is there, of a file of ``size`` bytes.

    Args:
        stream: positioned at the magic.
        size: what tensors must fit in.
        path: for messages, and for whoever reads the tensors.

    Raises:
        GGUFError: see :func:`read_gguf`.
    """
    cursor = _Cursor(stream, size, str(path))
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise GGUFError(f"{path}: not a GGUF file; give a .gguf model")
    version = cursor.scalar("I")
    if version not in (2, 3):
        hint = "big-endian files are" if version & 0xFFFF == 0 else f"GGUF version {version} is"
        raise GGUFError(f"{path}: {hint} not supported; convert it with a current llama.cpp")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    # The shortest entry takes 13 bytes, the shortest tensor 32: lying counts fail before any loop.
    if key_count * 13 + tensor_count * 32 > cursor.size:
        raise GGUFError(f"{path}: claims {key_count} keys and {tensor_count} tensors, more than fit; it is damaged")
    keys = tuple(_read_key(cursor) for _ in range(key_count))
    _refuse_duplicates(path, [entry.key for entry in keys], "metadata key")
    alignment = _alignment(path, keys)
    raw = [_read_tensor_header(cursor) for _ in range(tensor_count)]
    _refuse_duplicates(path, [name for name, *_ in raw], "tensor")
    data_start = align(cursor.position, alignment)
    tensors = tuple(_place(path, entry, data_start, alignment, cursor.size) for entry in raw)
    _refuse_overlaps(path, tensors)
    return GGUFFile(path, version, keys, tensors, alignment, data_start, cursor.size)


def _read_key(cursor: _Cursor) -> KeyValue:
    key = cursor.text()
    start = cursor.position
    _skip(cursor, cursor.scalar("I"))
    return KeyValue(key, cursor.data[start : cursor.position], start)


def _skip(cursor: _Cursor, kind: int) -> None:
    if kind in SCALARS:
        cursor.take(struct.calcsize("<" + SCALARS[kind]))
    elif kind == _STRING:
        cursor.take(cursor.scalar("Q"))
    elif kind == _ARRAY:
        inner, count = cursor.scalar("I"), cursor.scalar("Q")
        if inner in SCALARS:
            cursor.take(struct.calcsize("<" + SCALARS[inner]) * count)
        elif inner == _STRING:
            if count * 8 > cursor.size - cursor.position:
                raise GGUFError(f"{cursor.name}: an array near byte {cursor.position} runs past the end of the file")
            cursor.skip_strings(count)
        else:  # llama.cpp knows no arrays of arrays either
            raise GGUFError(f"{cursor.name}: array of unknown type {inner} near byte {cursor.position}")
    else:
        raise GGUFError(f"{cursor.name}: unknown value type {kind} near byte {cursor.position}; the file is damaged")


def _decode(cursor: _Cursor, kind: int) -> Any:
    if kind in SCALARS:
        return cursor.scalar(SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    inner, count = cursor.scalar("I"), cursor.scalar("Q")
    if inner == _STRING:
        return [cursor.text() for _ in range(count)]
    code = SCALARS[inner]
    return list(struct.unpack(f"<{count}{code}", cursor.take(struct.calcsize("<" + code) * count)))


def _read_tensor_header(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text()
    dims = cursor.scalar("I")
    if not 1 <= dims <= _MAX_DIMS:
        raise GGUFError(f"{cursor.name}: tensor {name!r} claims {dims} dimensions; the file is damaged")
    shape = tuple(cursor.scalar("Q") for _ in range(dims))
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _place(
    path: Path, entry: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int, size: int
) -> TensorInfo:
    from npti_export.gguf.blocks import block_shape

    name, shape, type_id, offset = entry
    block, nbytes = block_shape(type_id, f"{path}: tensor {name}")
    if min(shape) < 1 or shape[0] % block:
        raise GGUFError(f"{path}: tensor {name} has shape {shape}, which its type cannot store; the file is damaged")
    total = math.prod(shape) // block * nbytes
    if offset % alignment or data_start + offset + total > size:
        raise GGUFError(f"{path}: tensor {name} lies outside the file; it is truncated, download or copy it again")
    return TensorInfo(name, shape, type_id, data_start + offset, total)


def _alignment(path: Path, keys: tuple[KeyValue, ...]) -> int:
    value = next((entry.value for entry in keys if entry.key == "general.alignment"), DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or value <= 0 or value & (value - 1) or value > 1 << 20:
        raise GGUFError(f"{path}: general.alignment is {value!r}, not a power of two; the file is damaged")
    return value


def _refuse_duplicates(path: Path, names: list[str], what: str) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise GGUFError(f"{path}: {what} {twice!r} occurs twice; the file is damaged")


def _refuse_overlaps(path: Path, tensors: tuple[TensorInfo, ...]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for left, right in itertools.pairwise(ordered):
        if left.offset + left.nbytes > right.offset:
            raise GGUFError(f"{path}: tensors {left.name} and {right.name} overlap; the file is damaged")


def align(position: int, alignment: int) -> int:
    """The next multiple of ``alignment`` from ``position`` on."""
    return -(-position // alignment) * alignment
