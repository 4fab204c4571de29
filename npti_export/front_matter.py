"""What the front matter of a model card says. A card comes with a model, from whoever made it: it is read in bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LARGEST = 1 << 17  # bytes of a card that are looked at; front matter has some hundreds, with results some thousands
_DEEPEST = 16  # lists and mappings within each other
_MOST = 8  # values of a list
_BLOCK = re.compile(r"\ufeff?\s*---[\r\n]+(.*?)[\r\n]+---(?:[\r\n]|$)", re.DOTALL)
_NOTHING = ("", "~", "null", "Null", "NULL")  # how YAML writes it


def stated(card: Path, key: str) -> list[str]:
    """The text, or the few texts, that a model card gives for a key; nothing for a card that cannot be read.

    YAML is read as far as the key, as a series of what stands there one after the other. Nothing is made of it, so that
    aliases, by which a few lines would become gigabytes, stand for themselves.
    """
    import yaml

    try:
        with card.open("rb") as stream:
            text = stream.read(_LARGEST).decode("utf-8", "replace")
        block = _BLOCK.match(text)
        return [] if block is None else _values(yaml.parse(block[1], Loader=yaml.SafeLoader), key)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # a card is prose: no reason to refuse the model
        return []


def _values(events: Iterator[Any], key: str) -> list[str]:
    import yaml

    depth, names = 0, False  # whether what comes next in the outermost mapping is a key
    for event in events:
        if depth == 1 and names and isinstance(event, yaml.ScalarEvent) and event.value == key:
            return _texts(events)
        if isinstance(event, yaml.CollectionStartEvent):
            if depth == 0 and not isinstance(event, yaml.MappingStartEvent):
                return []
            names = depth == 0 or names
            depth += 1
            if depth > _DEEPEST:
                return []
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            names = not names if depth == 1 else names
        elif isinstance(event, yaml.NodeEvent) and depth == 1:
            names = not names
    return []


def _texts(events: Iterator[Any]) -> list[str]:
    """What comes next, if it is text or a list of a few."""
    import yaml

    found: list[str] = []
    event = next(events)
    several = isinstance(event, yaml.SequenceStartEvent)
    if several:
        event = next(events)
    while isinstance(event, yaml.ScalarEvent) and len(found) < _MOST:
        found.append(event.value)
        if not several:
            return [] if event.implicit[0] and event.value in _NOTHING else found
        event = next(events)
    return found if isinstance(event, yaml.SequenceEndEvent) else []
