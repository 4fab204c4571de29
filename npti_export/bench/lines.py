"""JSON Lines files with a strict schema: a line that does not follow it is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npti_export.errors import BenchError, shortened

PLACEHOLDER = "PLACEHOLDER"  # how a text begins that bench new wrote and nobody has replaced yet
LONGEST_TEXT = 8000  # characters; no question or persona needs more, and a model's context has room for it


@dataclass(frozen=True)
class Fault:
    """What is wrong with one line."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}" if self.line else f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Schema:
    """The keys of a line; the values of each are non-empty strings, of the given ones if any are given.

    Attributes:
        required: keys that every line has.
        optional: keys that it may have, beside ``source``, which is an object that nobody interprets.
    """

    required: Mapping[str, Collection[str] | None]
    optional: Mapping[str, Collection[str] | None]

    def fault(self, item: dict[str, Any]) -> str | None:
        """What is wrong with a line's object, None if nothing is."""
        known = {*self.required, *self.optional, "source"}
        missing, unknown = sorted(set(self.required) - set(item)), sorted(set(item) - known)
        if missing or unknown:
            needs = f"needs {', '.join(self.required)} and may have {', '.join([*self.optional, 'source'])}"
            return f"has keys {shortened(', '.join(sorted(item)), 200)}; {needs}"
        for key, allowed in (*self.required.items(), *self.optional.items()):
            if key not in item:
                continue
            value = item[key]
            if not isinstance(value, str) or not value.strip():
                return f"{key!r} must be a non-empty string"
            if len(value) > LONGEST_TEXT:
                return f"{key!r} has {len(value)} characters; at most {LONGEST_TEXT} make sense"
            if not _encodable(value):
                return f"{key!r} holds half a surrogate pair, which no text can hold"
            if allowed is not None and value not in allowed:
                return f"{key!r} is {shortened(value)}, must be one of {', '.join(allowed)}"
        if not isinstance(item.get("source", {}), dict):
            return "'source' must be an object"
        return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(path: Path, data: bytes, schema: Schema, faults: list[Fault]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The good lines of a file with their numbers, from 1; bad ones go to ``faults``, empty ones are passed over."""
    found = False
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        found = True
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(Fault(path, number, f"not a JSON object ({error})"))
            continue
        fault = schema.fault(item) if isinstance(item, dict) else "not a JSON object"
        if fault is not None:
            faults.append(Fault(path, number, fault))
            continue
        yield number, item
    if not found:
        faults.append(Fault(path, 0, "is empty; it needs one JSON object a line"))


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        BenchError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from error
