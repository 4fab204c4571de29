"""Kept files that are believed only if they are what was written: safetensors with a SHA-256 of themselves inside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from npti_export.errors import DamagedError
from npti_export.files import atomic_output

Arrays = Mapping[str, npt.NDArray[Any]]
_RECORD = "npti"  # "sha256:<digest> <record>": a second key would come in any order, and other bytes each time
_UNSIGNED = b"0" * 64  # stands for the digest while it is computed
_LENGTH = 8  # bytes of the header's length
_LONGEST_HEADER = 1 << 24
_CHUNK = 1 << 22


def save_checked(path: Path, arrays: Arrays, record: Mapping[str, object]) -> None:
    """Write arrays and a JSON-able record to one safetensors file, atomically, replacing what is there.

    Its metadata hold the SHA-256 of the whole file, taken with 64 zeros in the digest's place.

    Raises:
        OutputError: it cannot be written.
        DiskFullError: no room.
    """
    header, rest = _signed(arrays, record)
    with atomic_output(path, force=True) as temporary, temporary.open("wb") as stream:
        # written by us, not by the library, so that a full disk is an OSError like everywhere else
        stream.write(header)
        stream.write(rest)


def encode_checked(arrays: Arrays, record: Mapping[str, object]) -> bytes:
    """The bytes that :func:`save_checked` writes."""
    return b"".join(_signed(arrays, record))


def _signed(arrays: Arrays, record: Mapping[str, object]) -> tuple[bytes, memoryview]:
    """The header of the file, which holds the checksum, and what follows it."""
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    written = json.dumps(record, sort_keys=True)
    data = memoryview(save(whole, metadata={_RECORD: f"sha256:{_UNSIGNED.decode()} {written}"}))
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    digest = hashlib.sha256(data).hexdigest().encode()
    return bytes(data[:end]).replace(_field(_UNSIGNED), _field(digest), 1), data[end:]


def digest_of(arrays: Arrays) -> str:
    """SHA-256 of what arrays hold, by name."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def load_checked(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what :func:`save_checked` wrote: the arrays and the record.

    Raises:
        DamagedError: missing, or not byte for byte what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _check(path)
        with safe_open(path, framework="np") as tensors:
            record = json.loads(tensors.metadata()[_RECORD].partition(" ")[2])
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, record  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is damaged ({error}); delete the file and run again") from error


def peek_record(path: Path) -> dict[str, Any]:
    """The record of a file that nobody has checked: what it claims, in a moment, however large it is.

    Raises:
        DamagedError: missing, or of another kind.
    """
    try:
        with path.open("rb") as stream:
            _, header = _header(stream)
        record = json.loads(json.loads(header)["__metadata__"][_RECORD].partition(" ")[2])
    except (OSError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise DamagedError(f"{path}: is damaged ({error}); delete the file and run again") from error
    if not isinstance(record, dict):
        raise DamagedError(f"{path}: is damaged (its record is no object); delete the file and run again")
    return record


def _check(path: Path) -> None:
    with path.open("rb") as stream:
        length, header = _header(stream)
        claimed = str(json.loads(header)["__metadata__"][_RECORD])[7:71].encode()
        if len(claimed) != len(_UNSIGNED) or header.count(_field(claimed)) != 1:
            raise ValueError("it holds no checksum")
        digest = hashlib.sha256(length + header.replace(_field(claimed), _field(_UNSIGNED)))
        for chunk in _chunks(stream):
            digest.update(chunk)
    if digest.hexdigest().encode() != claimed:
        raise ValueError("its checksum is wrong")


def _header(stream: BinaryIO) -> tuple[bytes, bytes]:
    """The bytes of the header's length, and the header.

    Raises:
        ValueError: it claims to be longer than any of ours.
    """
    length = stream.read(_LENGTH)
    size = int.from_bytes(length, "little")
    if size > _LONGEST_HEADER:
        raise ValueError("its header is too long")
    return length, stream.read(size)


def _chunks(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _field(digest: bytes) -> bytes:
    return b'"%s":"sha256:%s ' % (_RECORD.encode(), digest)
