"""Numbers and names as people read them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from npti_export.evaluate.document import Condition, ContrastPart, Document, Estimate
from npti_export.evaluate.poles import judged_otherwise, judged_pole, steered_poles
from npti_export.traits import FACETS

MISSING = "–"
# Overrides and embeddings of direction: they would turn the words around them, too.
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
# Controls but tab and newline, surrogates, and what XML 1.0 forbids besides.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text without what no page or picture may hold: control characters, halves of surrogate pairs, overrides."""
    return _FORBIDDEN.sub("\ufffd", _TURNING.sub("", text.replace("\r\n", "\n")))


def short(text: str, limit: int = 34) -> str:
    """One line of a picture's label."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number with a real minus sign; very large ones, and very small ones without a plus, by powers of ten."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) >= 1e7 or (not sign and 1e-9 < abs(value) < 10.0**-digits / 2):
        text = f"{value:{'+' if sign else ''}.1e}"
    else:
        text = f"{value:{'+' if sign else ''}.{digits}f}"
        if float(text) == 0:
            text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 0, *, sign: bool = False) -> str:
    """A share in percent."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = number(100 * value, digits, sign=True)  # no powers of ten: a very small share is none
    return f"{text if sign else text.lstrip('+')}%"


def share(part: ContrastPart) -> str:
    """The gain as a share of the better prompt's, with its interval where it has one."""
    within = part.share_interval
    text = percent(part.share_of_prompt)
    return text if within is None else f"{text} ({percent(within[0])} to {percent(within[1])})"


def interval(value: Estimate, digits: int = 3, *, sign: bool = False) -> str:
    """The ends of an interval."""
    return f"{number(value.low, digits, sign=sign)} to {number(value.high, digits, sign=sign)}"


def estimate(value: Estimate | None, digits: int = 3, *, sign: bool = False) -> str:
    """A mean and its interval."""
    return (
        MISSING if value is None else f"{number(value.mean, digits, sign=sign)} ({interval(value, digits, sign=sign)})"
    )


def size(count: Any) -> str:
    """A number of bytes."""
    return f"{count / 1e6:,.1f} MB" if isinstance(count, int | float) and not isinstance(count, bool) else plain(count)


def plain(value: Any) -> str:
    """A value of the recipe or of the settings, in one line."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested dictionaries."""
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, plain(value)


def traits_of(document: Document) -> str:
    """What was steered, in short."""
    return " and ".join(map(minus, document.traits)) or "no trait"


def judged(document: Document) -> str:
    """The pole that the answers were judged by; of an evaluation that does not say, all that was steered."""
    pole = judged_pole(document)
    return minus(pole) if pole else traits_of(document)


def judged_aside(document: Document) -> str:
    """In a sentence, how the judged pole and what the artifact steers towards differ; nothing where they do not."""
    if not judged_otherwise(document):
        return ""
    if judged_pole(document) in steered_poles(document):
        return f"Judged by {judged(document)}, one of the poles that the file steers towards: {traits_of(document)}."
    return f"Judged by {judged(document)}, and the file steers towards {traits_of(document)}."


def minus(pole: str) -> str:
    """A pole with a real minus sign, which a hyphen is easily overlooked for."""
    return pole[:-1] + "−" if pole.endswith("-") else pole


def in_order(traits: Iterable[str]) -> list[str]:
    """The Big Five in their usual order, then others as they come."""
    found = list(dict.fromkeys(traits))
    return [trait for trait in FACETS if trait in found] + [trait for trait in found if trait not in FACETS]


def steered_traits(document: Document) -> set[str]:
    """Names of the traits that were steered, without signs and strengths."""
    poles = [pole.get("pole", "") for pole in document.poles] + [trait.partition(":")[0] for trait in document.traits]
    return {pole.rstrip("+-−") for pole in poles if pole}


def best_prompt(document: Document) -> Condition | None:
    """The persona prompt of the unsteered model that does most for the trait."""
    prompts = [
        one
        for one in document.conditions
        if one.kind == "prompt" and one.gain is not None and not one.name.startswith("steered")
    ]
    return max(prompts, key=lambda one: one.gain.mean if one.gain else -math.inf, default=None)
