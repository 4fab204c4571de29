"""From an answer, which is untrusted text, to the items in it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

_LONGEST_ITEM = 4000  # characters; no filter lets anything near it through
_NUMBER = re.compile(r"^\s{0,8}(?:[#*_]{0,3}\s{0,2})(?:\d{1,4}\s?[.):]|[-*•])[*_]{0,3}\s{1,8}(?=\S)")
_FENCE = re.compile(r"^\s{0,3}```")
_QUOTES = {'"': '"', "“": "”", "«": "»"}


def read_items(text: str, asked: int) -> list[str]:
    """The items of an answer, in order: entries of a JSON array, of a numbered list, or else its lines.

    A line without a number belongs to the item above it; what stands before the first number is an introduction.

    Args:
        text: of the answer.
        asked: how many items were asked for; at most twice as many are read.
    """
    lines = [line for line in text.splitlines() if not _FENCE.match(line)]
    plain = "\n".join(lines).strip()
    entries = _json_array(plain)
    if entries is None:
        entries = _numbered(lines) or [line for line in lines if line.strip()]
    items = (_clean(entry) for entry in entries[: 2 * asked])
    return [item for item in items if item]


def _json_array(text: str) -> list[str] | None:
    if not text.startswith("["):
        return None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [entry for entry in entries if isinstance(entry, str)]


def _numbered(lines: Sequence[str]) -> list[str]:
    items: list[list[str]] = []
    for line in lines:
        match = _NUMBER.match(line)
        if match:
            items.append([line[match.end() :]])
        elif items and line.strip():
            items[-1].append(line)
    return [" ".join(parts) for parts in items]


def _clean(entry: str) -> str:
    # A little more than is kept, so that what is too long stays too long and is rejected for it.
    whole = entry[: _LONGEST_ITEM + 1].encode("utf-8", "replace").decode()  # JSON spells out halves of surrogate pairs
    text = " ".join(unicodedata.normalize("NFC", whole).split())
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def read_verdicts(text: str, count: int) -> list[bool | None]:
    """A judge's verdicts on questions 1 to ``count``; None where it gave none, or two that differ.

    The JSON may stand inside other text, as models without a schema like to explain themselves.
    """
    verdicts: list[bool | None] = [None] * count
    try:
        parsed = json.loads(text[text.index("{") : text.rindex("}") + 1])
        entries = parsed["verdicts"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return verdicts
    contradicted: set[int] = set()
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        number, differ = entry.get("question"), entry.get("differ")
        if type(number) is int and type(differ) is bool and 1 <= number <= count:
            if verdicts[number - 1] not in (None, differ):
                contradicted.add(number - 1)
            verdicts[number - 1] = differ
    return [None if at in contradicted else verdict for at, verdict in enumerate(verdicts)]
