"""Bounds-checked reading of GGUF's numbers, strings and metadata values (ggml docs/gguf.md), little-endian."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from npti_export.errors import GGUFError, shortened

UINT8, UINT16, UINT32, INT32, STRING, ARRAY = 0, 2, 4, 5, 8, 9
# value type -> struct format; ggml docs/gguf.md, gguf_metadata_value_type
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_HEADER = 128 << 20  # far beyond any model: a vocabulary of 256 thousand tokens takes 12 MB
_LENGTH = struct.Struct("<Q")
_READ_AHEAD = 1 << 20


class Cursor:
    """Bounds-checked reads from the front of a binary stream, buffered as far as it was read."""

    def __init__(self, stream: BinaryIO, size: int, name: str) -> None:
        self.stream, self.size, self.name, self.position = stream, size, name, 0
        self.limit = min(size, MAX_HEADER)
        self.data = b""

    def need(self, count: int) -> None:
        """Make ``count`` more bytes available, or raise."""
        end = self.position + count
        if end > self.size:
            raise self.truncated()
        if end > self.limit:
            raise GGUFError(f"{self.name}: its header claims to be longer than {self.limit >> 20} MB; it is damaged")
        while len(self.data) < end:
            ahead = min(max(_READ_AHEAD, len(self.data)), self.limit - len(self.data))
            more = self.stream.read(max(end - len(self.data), ahead))
            if not more:
                raise self.truncated()
            self.data += more

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
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
        """The next number, of a :mod:`struct` format."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def short_text(self, longest: int, what: str) -> str:
        """A name of at most ``longest`` bytes that can be printed, as it gets into messages."""
        length = self.scalar("Q")
        if length > longest:
            raise GGUFError(f"{self.name}: {what} near byte {self.position} claims {length} bytes; the file is damaged")
        self.position -= 8
        name = self.text()
        if not name.isprintable():
            raise GGUFError(f"{self.name}: {what} {shortened(name)} cannot be printed; the file is damaged")
        return name

    def text(self) -> str:
        """The next string."""
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(
                f"{self.name}: a string near byte {self.position} is not UTF-8; the file is damaged"
            ) from error

    def truncated(self) -> GGUFError:
        """What to raise where the stream ends early."""
        return GGUFError(f"{self.name}: truncated near byte {self.position}; download or copy the file again")


def skip_value(cursor: Cursor, kind: int) -> None:
    """Go past a value of a type.

    Raises:
        GGUFError: an unknown type, or past the end.
    """
    if kind in SCALARS:
        cursor.take(struct.calcsize("<" + SCALARS[kind]))
    elif kind == STRING:
        cursor.take(cursor.scalar("Q"))
    elif kind == ARRAY:
        inner, count = cursor.scalar("I"), cursor.scalar("Q")
        if inner in SCALARS:
            cursor.take(struct.calcsize("<" + SCALARS[inner]) * count)
        elif inner == STRING:
            if count * 8 > cursor.size - cursor.position:
                raise GGUFError(f"{cursor.name}: an array near byte {cursor.position} runs past the end of the file")
            cursor.skip_strings(count)
        else:  # llama.cpp knows no arrays of arrays either
            raise GGUFError(f"{cursor.name}: array of unknown type {inner} near byte {cursor.position}")
    else:
        raise GGUFError(f"{cursor.name}: unknown value type {kind} near byte {cursor.position}; the file is damaged")


def decode_value(cursor: Cursor, kind: int) -> Any:
    """Read a value that :func:`skip_value` went past.

    Raises:
        GGUFError: a string is not UTF-8.
    """
    if kind in SCALARS:
        return cursor.scalar(SCALARS[kind])
    if kind == STRING:
        return cursor.text()
    inner, count = cursor.scalar("I"), cursor.scalar("Q")
    if inner == STRING:
        return [cursor.text() for _ in range(count)]
    code = SCALARS[inner]
    return list(struct.unpack(f"<{count}{code}", cursor.take(struct.calcsize("<" + code) * count)))
