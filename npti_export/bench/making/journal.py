"""Every answer that came, one JSON line each: what cost time or money is on the disk before anything is made of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npti_export.errors import BenchError
from npti_export.files import translate_os_errors

_SYNC_SECONDS = 2.0  # a power cut loses no more than this; a killed process loses nothing that was written


@dataclass(frozen=True)
class Record:
    """The outcome of an order.

    Attributes:
        order: its number.
        text: the answer; empty where it was unusable.
        cut: whether the answer broke off.
        fault: why it was unusable, or empty.
        tokens_in: of generator and judge together.
        tokens_out: likewise.
        requests: answers that it took, the judge's included.
        verdicts: for each item of the answer, whether the judge lets it through (None: it was not judged, or not in
            one way); None without a judge.
    """

    order: int
    text: str
    cut: bool = False
    fault: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    requests: int = 1
    verdicts: list[bool | None] | None = None


class Journal:
    """Append-only file of :class:`Record`. A last line that a crash tore is cut off when it is opened.

    Args:
        path: of the file; made if it is not there.

    Raises:
        OutputError: it cannot be written.
        DiskFullError: no room.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with translate_os_errors(path):
            self._file = path.open("ab", buffering=0)
            self.mended = self._cut_torn_line()
        self._synced = time.monotonic()

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        if not self._file.closed:
            with translate_os_errors(self._path):
                os.fsync(self._file.fileno())
            self._file.close()

    def append(self, record: Record) -> None:
        """Add a line; it survives the death of the process.

        Raises:
            DiskFullError: no room; what was written of the line is cut off by the next opening.
        """
        line = json.dumps(vars(record), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        with translate_os_errors(self._path):
            view = memoryview(line)
            while view:  # a write to a file that is nearly full may take a part only
                view = view[self._file.write(view) :]
            now = time.monotonic()
            if now - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = now

    def records(self, least: int) -> Iterator[Record]:
        """Those of orders from number ``least`` on, as they came; all other lines are only looked at in passing.

        Raises:
            BenchError: a line is no record; file and line are named.
        """
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = _record(json.loads(line))
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise BenchError(
                        f"{self._path}:{number}: is damaged; delete this line to ask that order again, or pass --force "
                        "to start anew"
                    ) from error
                if record.order >= least:
                    yield record

    def _cut_torn_line(self) -> bool:
        size = self._path.stat().st_size
        keep = size
        with self._path.open("rb") as stream:
            while keep:
                start = max(0, keep - (1 << 16))
                stream.seek(start)
                end = stream.read(keep - start).rfind(b"\n")
                keep = start + end + 1
                if end >= 0:
                    break
        if keep < size:
            os.truncate(self._path, keep)
        return keep < size


_TYPES: dict[str, tuple[type, ...]] = {
    "order": (int,), "text": (str,), "cut": (bool,), "fault": (str,), "tokens_in": (int,), "tokens_out": (int,),
    "requests": (int,), "verdicts": (list, type(None)),
}  # fmt: skip


def _record(raw: dict[str, Any]) -> Record:
    if any(not isinstance(raw[name], types) for name, types in _TYPES.items()):
        raise TypeError
    if any(verdict not in (True, False, None) for verdict in raw["verdicts"] or ()):
        raise TypeError
    return Record(**raw)
