"""Every answer that came, one JSON line each, so that a build goes on from where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npti_export.append_only import AppendOnly
from npti_export.errors import BenchError


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
        OutputError: it cannot be written, is no journal, or another run has it open.
        DiskFullError: no room.
    """

    def __init__(self, path: Path) -> None:
        self._lines = AppendOnly(path, "order", otherwise="pass --force to start anew")
        self.mended = self._lines.mended

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        self._lines.close()

    def append(self, record: Record) -> None:
        """Add a line; it survives the death of the process.

        Raises:
            DiskFullError: no room; what was written of the line is cut off by the next opening.
        """
        self._lines.append(vars(record))

    def records(self, least: int) -> Iterator[Record]:
        """Those of orders from number ``least`` on, as they came; all other lines are only looked at in passing.

        Raises:
            BenchError: a line is no record; file and line are named.
        """
        for number, line in self._lines.lines():
            try:
                record = _record(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise BenchError(
                    f"{self._lines.path}:{number}: is damaged; delete this line to ask that order again, or pass "
                    "--force to start anew"
                ) from error
            if record.order >= least:
                yield record


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
