"""A file of JSON lines that only grows: what cost time or money is on the disk before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from npti_export.errors import OutputError
from npti_export.files import translate_os_errors

if sys.platform != "win32":
    import fcntl

_SUM = re.compile(rb',"sum":"([0-9a-f]{16})"\}\n?$')  # first 64 bits of the SHA-256 of the line without it
_SYNC_SECONDS = 2.0  # a power cut loses no more than this; a killed process loses nothing that was written


class AppendOnly:
    """JSON lines, one value each, with a checksum. A last line that a crash tore is cut off when the file is opened.

    That happens only where all lines before it are ours and it begins like one of ours: a file of another kind stays
    as it is. While it is open it is locked, where the system has such locks.

    Attributes:
        mended: whether a line was cut off.

    Args:
        path: of the file; made if it is not there.
        first: key that every value begins with; any where empty.
        otherwise: what to do about a file of another kind, for messages.

    Raises:
        OutputError: it cannot be written, ends in something else than a line of ours, or another run has it open.
        DiskFullError: no room.
    """

    def __init__(self, path: Path, first: str = "", *, otherwise: str = "name another file") -> None:
        self.path = path
        self._begins = f'{{"{first}":'.encode() if first else b'{"'
        with translate_os_errors(path):
            self._file = path.open("ab", buffering=0)
            try:
                self._lock()
                self.mended = self._cut_torn_line(otherwise)
            except BaseException:
                self._file.close()
                raise
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

    def lines(self, end: int | None = None) -> Iterator[tuple[int, bytes]]:
        """The values' JSON, with their lines' numbers from 1; of a line that is not what was written, nothing (b"").

        Args:
            end: byte that is read up to; None for all.
        """
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if end is not None:
                    end -= len(line)
                    if end < 0:
                        return
                found = _SUM.search(line)
                body = b"" if found is None else line[: found.start()] + b"}"
                yield number, body if found is not None and found[1] == _sum(body) else b""

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{self.path}: another run writes to it; wait for it, or name another file") from error
        except OSError:  # a file system without locks
            pass

    def _cut_torn_line(self, otherwise: str) -> bool:
        size = self.path.stat().st_size
        keep = self._whole(size)
        if keep == size:
            return False
        if not self._is_torn(keep):
            raise OutputError(f"{self.path}: is there already, and is no journal of npti-export; {otherwise}")
        if any(body == b"" for _, body in self.lines(keep)):  # the reader says which one
            return False
        os.truncate(self.path, keep)
        return True

    def _whole(self, size: int) -> int:
        """Where the last whole line ends."""
        keep = size
        with self.path.open("rb") as stream:
            while keep:
                start = max(0, keep - (1 << 16))
                stream.seek(start)
                end = stream.read(keep - start).rfind(b"\n")
                keep = start + end + 1
                if end >= 0:
                    break
        return keep

    def _is_torn(self, start: int) -> bool:
        """Whether what follows is the beginning of a line of ours; a whole value is so only with its checksum."""
        with self.path.open("rb") as stream:
            stream.seek(start)
            begins = stream.read(len(self._begins))
            if not self._begins.startswith(begins):
                return False
            tail = begins + stream.read()
        if _SUM.search(tail):
            return True
        try:
            json.loads(tail)
        except (ValueError, RecursionError):
            return True
        return False


def _sum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()
