"""Read the header of a GGUF file: keys kept as raw bytes, tensors as places in the file.

Layout after the GGUF specification (ggml docs/gguf.md), versions 2 and 3, little-endian. Nothing is
memory-mapped, so that reading a header never counts the weights as used memory. Every count and length
is checked against the file's size, and against what any model has, before anything is allocated: a file may have
a hole of terabytes that lying lengths fit in.
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

from npti_export.errors import GGUFError, shortened
from npti_export.gguf.cursor import ARRAY, INT32, STRING, UINT8, UINT32, Cursor, decode_value, skip_value

MAGIC = b"GGUF"
CONTROL_VECTOR = "controlvector"  # general.architecture of one (llama.cpp, tools/cvector-generator)
DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_LONGEST_KEY = 65535  # ggml docs/gguf.md, gguf_metadata_kv_t
_LONGEST_NAME = 63  # GGML_MAX_NAME of ggml.h, less the zero at the end
_MAX_KEYS, _MAX_TENSORS = 1 << 16, 1 << 17  # DeepSeek with every expert by itself has 46 thousand tensors
_MAX_ALIGNMENT = 1 << 20
_MAX_SIZE = 1 << 24  # of neurons and hidden values; Llama 405B has 53248 neurons a layer
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp's src/llama-hparams.h


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry: ``raw`` is its exact encoding, type tag included, key excluded; it lies at ``position``.

    ``where`` names the file and the key in messages.
    """

    key: str
    raw: bytes
    position: int
    where: str = ""

    @cached_property
    def value(self) -> Any:
        """The decoded value: a Python scalar, a string or a list of these.

        Raises:
            GGUFError: a string is not UTF-8.
        """
        cursor = Cursor(io.BytesIO(self.raw), len(self.raw), self.where or self.key)
        return decode_value(cursor, cursor.scalar("I"))

    @property
    def kind(self) -> int:
        """The number of its type (ggml docs/gguf.md, gguf_metadata_value_type)."""
        return int(struct.unpack_from("<I", self.raw)[0])

    @property
    def array(self) -> tuple[int, int] | None:
        """Type and number of the elements, without decoding them; None if it is no array."""
        return struct.unpack_from("<IQ", self.raw, 4) if self.kind == ARRAY else None

    @property
    def shown(self) -> Any:
        """The value for people: of an array only how long it is."""
        if self.array is None:
            return self.value
        inner, count = self.array
        return f"{count} bytes" if inner == UINT8 else f"{count} values"


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

    def require_int(self, key: str, most: int = _MAX_SIZE) -> int:
        """The value of a key that must be there and be a positive integer, at most ``most``.

        Raises:
            GGUFError: missing, or something else.
        """
        entry = self.by_key.get(key)
        if entry is not None and entry.array is not None:
            raise GGUFError(f"{self.path}: {key} is an array, one value a layer, which is not supported")
        value = None if entry is None else entry.value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise GGUFError(
                f"{self.path}: metadata key {key} is missing or not a positive integer; the file is damaged"
            )
        if value > most:
            raise GGUFError(f"{self.path}: {key} is {value}, and more than {most} cannot be; the file is damaged")
        return value

    def number(self, key: str) -> int | None:
        """The value of a key that is an integer from 0 on if it is there.

        Raises:
            GGUFError: something else.
        """
        entry = self.by_key.get(key)
        if entry is None:
            return None
        value = None if entry.array is not None else entry.value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise GGUFError(f"{self.path}: metadata key {key} is not a number; the file is damaged")
        return value

    def text(self, key: str) -> str | None:
        """The value of a key that is a string if it is there.

        Raises:
            GGUFError: something else.
        """
        entry = self.by_key.get(key)
        if entry is None:
            return None
        if entry.kind != STRING:
            raise GGUFError(f"{self.path}: metadata key {key} is not a string; the file is damaged")
        return str(entry.value)

    def data(self, key: str) -> bytes | None:
        """The value of a key that is an array of uint8 if it is there, without making numbers of its bytes.

        Raises:
            GGUFError: something else.
        """
        entry = self.by_key.get(key)
        if entry is None:
            return None
        if entry.array is None or entry.array[0] != UINT8:
            raise GGUFError(f"{self.path}: metadata key {key} is not an array of bytes; the file is damaged")
        return entry.raw[16:]  # past type, element type and count

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            GGUFError: the key is missing or not a string.
        """
        value = self.text("general.architecture")
        if value is None:
            raise GGUFError(f"{self.path}: general.architecture is missing; this is not a language model")
        if len(value) > _LONGEST_NAME or not value.isprintable():
            raise GGUFError(f"{self.path}: general.architecture is {shortened(value)}; the file is damaged")
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


def layer_count(header: GGUFFile) -> int:
    """How many layers the model says it has.

    Raises:
        GGUFError: it does not say, or more than llama.cpp can load.
    """
    return header.require_int(f"{header.architecture}.block_count", most=_MAX_LAYERS)


def mlp_widths(header: GGUFFile) -> list[int]:
    """Neurons of each layer's MLP: llama.cpp reads one number for all, or an array with one a layer, which may be 0.

    Raises:
        GGUFError: neither.
    """
    return widths_of(header, f"{header.architecture}.feed_forward_length", layer_count(header))


def widths_of(header: GGUFFile, key: str, layers: int) -> list[int]:
    """The widths that a key gives, of the types that llama.cpp takes (``get_key_or_arr``, llama-model-loader.cpp).

    Raises:
        GGUFError: missing, of another type or length, or widths that cannot be.
    """
    entry = header.by_key.get(key)
    if entry is None or entry.array is None:
        width = header.require_int(key)
        if header.by_key[key].kind != UINT32:
            raise GGUFError(f"{header.path}: {key} is not a uint32; the file is damaged")
        return [width] * layers
    inner, count = entry.array
    values: list[int] = entry.value if inner in (UINT32, INT32) and count == layers else []
    if not any(values) or min(values) < 0 or max(values) > _MAX_SIZE:
        raise GGUFError(f"{header.path}: {key} is not one width for each of {layers} layers; the file is damaged")
    return values


def is_mixture(header: GGUFFile) -> bool:
    """Whether the MLPs are experts."""
    experts = header.by_key.get(f"{header.architecture}.expert_count")
    return experts is not None and (experts.array is not None or experts.value != 0)


def is_control_vector(header: GGUFFile) -> bool:
    """Whether a file is a control vector of llama.cpp, not a model."""
    return header.text("general.architecture") == CONTROL_VECTOR


def read_gguf(path: Path) -> GGUFFile:
    """Read a GGUF header and check it against the file's size.

    Raises:
        GGUFError: missing, not GGUF, unsupported version or byte order, truncated or inconsistent.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits until someone writes to it
            raise GGUFError(f"{path}: is not a file; give a .gguf model")
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
    cursor = Cursor(stream, size, str(path))
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise GGUFError(f"{path}: not a GGUF file; give a .gguf model")
    version = cursor.scalar("I")
    if version not in (2, 3):
        hint = "big-endian files are" if version & 0xFFFF == 0 else f"GGUF version {version} is"
        raise GGUFError(f"{path}: {hint} not supported; convert it with a current llama.cpp")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    # The shortest entry takes 13 bytes, the shortest tensor 32: lying counts fail before any loop.
    fits = key_count * 13 + tensor_count * 32 <= cursor.size
    if not fits or key_count > _MAX_KEYS or tensor_count > _MAX_TENSORS:
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


def _read_key(cursor: Cursor) -> KeyValue:
    key = cursor.short_text(_LONGEST_KEY, "a metadata key")
    start = cursor.position
    skip_value(cursor, cursor.scalar("I"))
    return KeyValue(key, cursor.data[start : cursor.position], start, f"{cursor.name}: {shortened(key)}")


def _read_tensor_header(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.short_text(_LONGEST_NAME, "the name of a tensor")
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
    entry = next((entry for entry in keys if entry.key == "general.alignment"), None)
    if entry is None:
        return DEFAULT_ALIGNMENT
    # llama.cpp takes no other type (ggml gguf.cpp, gguf_init_from_reader)
    value = int(entry.value) if entry.kind == UINT32 else 0
    if value <= 0 or value & (value - 1) or value > _MAX_ALIGNMENT:
        raise GGUFError(
            f"{path}: general.alignment is not a uint32 that is a power of two up to {_MAX_ALIGNMENT}; it is damaged"
        )
    return value


def _refuse_duplicates(path: Path, names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise GGUFError(f"{path}: {what} {shortened(name)} occurs twice; the file is damaged")
        seen.add(name)


def _refuse_overlaps(path: Path, tensors: tuple[TensorInfo, ...]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for left, right in itertools.pairwise(ordered):
        if left.offset + left.nbytes > right.offset:
            raise GGUFError(f"{path}: tensors {left.name} and {right.name} overlap; the file is damaged")


def align(position: int, alignment: int) -> int:
    """The next multiple of ``alignment`` from ``position`` on."""
    return -(-position // alignment) * alignment
