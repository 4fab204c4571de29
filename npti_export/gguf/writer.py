"""Write a GGUF header, and patch values of a fixed size in a file that is already written."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from npti_export.gguf.reader import MAGIC, align, read_gguf

_UINT8, _UINT32, _STRING, _ARRAY, _UINT64, _FLOAT64 = 0, 4, 8, 9, 10, 12

Value = bool | int | float | str | bytes


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a file to be written; ``offset`` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int
    offset: int = 0


def encode_value(value: Value) -> bytes:
    """A metadata value with its type tag: str, bytes (an array of uint8), int (uint64) or float (float64)."""
    if isinstance(value, str):
        data = value.encode("utf-8")
        return struct.pack("<IQ", _STRING, len(data)) + data
    if isinstance(value, bytes):
        return struct.pack("<IIQ", _ARRAY, _UINT8, len(value)) + value
    if isinstance(value, int):
        return struct.pack("<IQ", _UINT64, value)
    return struct.pack("<Id", _FLOAT64, value)


def encode_uint32(value: int) -> bytes:
    """A metadata value of the type that llama.cpp uses for sizes."""
    return struct.pack("<II", _UINT32, value)


def lay_out(tensors: Sequence[NewTensor], alignment: int) -> list[NewTensor]:
    """Give the tensors offsets one after the other, each aligned, as gguf-py and llama.cpp do."""
    placed, position = [], 0
    for tensor in tensors:
        placed.append(NewTensor(tensor.name, tensor.shape, tensor.type_id, tensor.nbytes, position))
        position = align(position + tensor.nbytes, alignment)
    return placed


def encode_header(
    version: int, keys: Sequence[tuple[str, bytes]], tensors: Sequence[NewTensor], alignment: int
) -> bytes:
    """Everything in front of the data section, its zero padding included (ggml docs/gguf.md)."""
    parts = [MAGIC, struct.pack("<IQQ", version, len(tensors), len(keys))]
    for key, raw in keys:
        parts += [_text(key), raw]
    for tensor in tensors:
        parts += [
            _text(tensor.name),
            struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape),
            struct.pack("<IQ", tensor.type_id, tensor.offset),
        ]
    header = b"".join(parts)
    return header + b"\0" * (align(len(header), alignment) - len(header))


def patch_values(path: Path, values: dict[str, Value]) -> None:
    """Replace values of a written file by others of the same encoded length (a placeholder's).

    Raises:
        KeyError: the file has no such key.
        ValueError: the lengths differ.
    """
    keys = read_gguf(path).by_key
    with path.open("rb+") as stream:
        for key, value in values.items():
            raw = encode_value(value)
            if len(raw) != len(keys[key].raw):
                raise ValueError(f"{key}: {len(raw)} bytes do not fit in {len(keys[key].raw)}")
            stream.seek(keys[key].position)
            stream.write(raw)


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
