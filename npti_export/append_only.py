"""A file of JSON lines that only grows: what cost time or money is on the disk before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from npti_export.files import translate_os_errors

_SUM = re.compile(rb',"sum":"([0-9a-f]{16})"\}\n?$')  # first 64 bits of the SHA-256 of the line without it
_SYNC_SECONDS = 2.0  # a power cut loses no more than this; a killed process loses nothing that was written


class AppendOnly:
    """JSON lines, one value each, with a checksum. A last line that a crash tore is cut off when the file is opened.

    Attributes:
        mended: whether that was so.

    Args:
        path: of the file; made if it is not there.

    Raises:
        OutputError: it cannot be written.
        DiskFullError: no room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with translate_os_errors(path):
            self._file = path.open("ab", buffering=0)
            self.mended = self._cut_torn_line()
        self._synced = time.monotonic()

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        if not self._file.closed:
            with translate_os_errors(self.path):
                os.fsync(self._file.fileno())
            self._file.close()

    def append(self, value: Mapping[str, object]) -> None:
        """Add a line; it survives the death of the process.

        Raises:
            DiskFullError: no room; what was written of the line is cut off by the next opening.
        """
        body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        line = b'%s,"sum":"%s"}\n' % (body[:-1], _sum(body))
        with translate_os_errors(self.path):
            view = memoryview(line)
            while view:  # a write to a file that is nearly full may take a part only
                view = view[self._file.write(view) :]
            now = time.monotonic()
            if now - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = now

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The values' JSON, with their lines' numbers from 1; of a line that is not what was written, nothing (b"")."""
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                found = _SUM.search(line)
                body = b"" if found is None else line[: found.start()] + b"}"
                yield number, body if found is not None and found[1] == _sum(body) else b""

    def _cut_torn_line(self) -> bool:
        size = self.path.stat().st_size
        keep = size
        with self.path.open("rb") as stream:
            while keep:
                start = max(0, keep - (1 << 16))
                stream.seek(start)
                end = stream.read(keep - start).rfind(b"\n")
                keep = start + end + 1
                if end >= 0:
                    break
        if keep < size:
            os.truncate(self.path, keep)
        return keep < size


def _sum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()
