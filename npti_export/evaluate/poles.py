"""Which pole an evaluation judged, beside those that the artifact steers towards."""

from __future__ import annotations

from contextlib import suppress

from npti_export.errors import TraitError
from npti_export.evaluate.document import Document
from npti_export.traits import parse_recorded


def judged_pole(document: Document) -> str:
    """The pole that answers were judged by; nothing of an evaluation that does not say."""
    pole = document.settings.get("pole")
    return pole if isinstance(pole, str) else ""


def steered_poles(document: Document) -> list[str]:
    """The poles that the artifact steers towards, without strengths; nicknames are resolved."""
    found = [one["pole"] for one in document.poles if one.get("pole")]
    if found:
        return found
    for text in document.traits:
        pole = text.partition(":")[0]
        with suppress(TraitError):
            pole = parse_recorded(text).pole
        found.append(pole)
    return found


def judged_otherwise(document: Document) -> bool:
    """Whether the judged pole is not just what the artifact steers towards."""
    pole = judged_pole(document)
    return bool(pole) and steered_poles(document) != [pole]
