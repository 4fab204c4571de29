"""Verdicts that came, one JSON line each, so that an evaluation that was killed asks only for what is missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from npti_export.append_only import AppendOnly
from npti_export.errors import EvaluationError, shortened
from npti_export.evaluate.judge.prompts import VERSION, What
from npti_export.runtimes.base import Message

_SHOWN = 200  # characters of an answer that could not be read


@dataclass(frozen=True)
class Verdict:
    """What a judge said of one answer.

    Attributes:
        rating: 1 to 5, of a local judge the expected one; None where it could not be read.
        fault: why not, or empty.
    """

    rating: float | None
    fault: str = ""


@dataclass(frozen=True)
class Asked:
    """A request to a judge. It knows nothing of how the answer was made.

    Attributes:
        what: is rated.
        messages: the chat.
    """

    what: What
    messages: Sequence[Message]

    def key(self, judge: str) -> str:
        """SHA-256 of the judge and of all that it is shown."""
        told = json.dumps([judge, VERSION, self.what, list(self.messages)], ensure_ascii=True)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def seed(self) -> int:
        """Of the sampling, 31 bits: the same for the same request."""
        return int(self.key("")[:8], 16) >> 1


class VerdictJournal:
    """Keeps verdicts by their key, in a file if there is one.

    Args:
        path: of the file; None keeps them for as long as this lives.

    Raises:
        EvaluationError: a line is no verdict; file and line are named.
        OutputError: the file cannot be written, is no journal, or another run has it open.
        DiskFullError: no room.
    """

    def __init__(self, path: Path | None) -> None:
        self._known: dict[str, Verdict] = {}
        self._file = AppendOnly(path, "key") if path is not None else None
        try:
            for number, line in self._file.lines() if self._file else ():
                self._known.update([_read(self._file.path if self._file else None, number, line)])
        except BaseException:
            self.close()
            raise

    def get(self, key: str) -> Verdict | None:
        """What is known under a key."""
        return self._known.get(key)

    def add(self, key: str, judge: str, what: What, verdict: Verdict) -> None:
        """Keep one; it survives the death of the process.

        Raises:
            DiskFullError: no room.
        """
        self._known[key] = verdict
        if self._file is not None:
            line = {"key": key, "judge": judge, "what": what, "rating": verdict.rating}
            self._file.append({**line, "fault": verdict.fault} if verdict.fault else line)

    def close(self) -> None:
        """Everything is on the disk afterwards."""
        if self._file is not None:
            self._file.close()


def unreadable(text: str) -> Verdict:
    """The verdict of an answer without a rating."""
    return Verdict(None, f"no rating in {shortened(text, _SHOWN)}" if text.strip() else "the answer is empty")


def _read(path: Path | None, number: int, line: bytes) -> tuple[str, Verdict]:
    try:
        raw = json.loads(line)
        key, rating, fault = raw["key"], raw["rating"], raw.get("fault", "")
        good = rating is None or (type(rating) in (int, float) and 1 <= rating <= 5)
        if not (isinstance(key, str) and isinstance(fault, str) and good):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{path}:{number}: is no verdict of a judge; delete this line to ask for it again, or name another file"
        ) from error
    return key, Verdict(None if rating is None else float(rating), fault)
