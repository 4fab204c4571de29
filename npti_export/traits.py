"""The Big Five, their poles and facets, and the notation a user types.

``agreeableness+`` is a pole, ``neuroticism-:0.5`` a pole at half strength, ``calm`` an everyday name for
``neuroticism-``. Facets are the six IPIP-NEO ones of each trait (paper, section on PersonalityBench).
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

from npti_export.errors import TraitError, shortened

Sign = Literal["+", "-"]
SIGNS: tuple[Sign, Sign] = ("+", "-")

FACETS: dict[str, tuple[str, ...]] = {
    "openness": (
        "imagination",
        "artistic interests",
        "emotionality",
        "adventurousness",
        "intellect",
        "liberalism",
    ),
    "conscientiousness": (
        "self-efficacy",
        "orderliness",
        "dutifulness",
        "achievement-striving",
        "self-discipline",
        "cautiousness",
    ),
    "extraversion": (
        "friendliness",
        "gregariousness",
        "assertiveness",
        "activity level",
        "excitement-seeking",
        "cheerfulness",
    ),
    "agreeableness": ("trust", "morality", "altruism", "cooperation", "modesty", "sympathy"),
    "neuroticism": ("anxiety", "anger", "depression", "self-consciousness", "immoderation", "vulnerability"),
}

EVERYDAY: dict[str, str] = {
    "curious": "openness+",
    "imaginative": "openness+",
    "creative": "openness+",
    "conventional": "openness-",
    "practical": "openness-",
    "traditional": "openness-",
    "organised": "conscientiousness+",
    "organized": "conscientiousness+",
    "diligent": "conscientiousness+",
    "careful": "conscientiousness+",
    "careless": "conscientiousness-",
    "messy": "conscientiousness-",
    "spontaneous": "conscientiousness-",
    "outgoing": "extraversion+",
    "talkative": "extraversion+",
    "extravert": "extraversion+",
    "extrovert": "extraversion+",
    "introversion": "extraversion-",
    "introvert": "extraversion-",
    "reserved": "extraversion-",
    "quiet": "extraversion-",
    "kind": "agreeableness+",
    "warm": "agreeableness+",
    "trusting": "agreeableness+",
    "antagonism": "agreeableness-",
    "blunt": "agreeableness-",
    "competitive": "agreeableness-",
    "suspicious": "agreeableness-",
    "anxious": "neuroticism+",
    "nervous": "neuroticism+",
    "moody": "neuroticism+",
    "calm": "neuroticism-",
    "stable": "neuroticism-",
    "relaxed": "neuroticism-",
}

_NOTATION = re.compile(r"^\s*(?P<name>[A-Za-z][A-Za-z _-]*?)\s*(?P<sign>[+\-−])?\s*(?::(?P<strength>.*))?$")


@dataclass(frozen=True)
class TraitSpec:
    """One requested pole: ``trait`` of the Big Five, its ``sign``, and a positive ``strength`` multiplier."""

    trait: str
    sign: Sign
    strength: float = 1.0

    @property
    def pole(self) -> str:
        """The pole without its strength, such as ``neuroticism-``."""
        return self.trait + self.sign

    def __str__(self) -> str:
        return self.pole if self.strength == 1.0 else f"{self.pole}:{self.strength!r}"


def parse_trait(text: str) -> TraitSpec:
    """Read ``agreeableness+``, ``neuroticism-:0.5`` or an everyday name such as ``calm``.

    Raises:
        TraitError: unknown name (the nearest known one is offered), a Big Five name without a sign, an
            everyday name with one, or a strength that is not a positive finite number.
    """
    match = _NOTATION.match(text)
    if match is None:
        raise TraitError(
            f"trait {shortened(text)}: not of the form NAME+, NAME- or NAME+:STRENGTH; see npti-export traits"
        )
    name, sign = match["name"].lower(), (match["sign"] or "").replace("−", "-")
    strength = _strength(text, match["strength"])
    if name in FACETS and sign:
        return TraitSpec(name, "+" if sign == "+" else "-", strength)
    if name in FACETS:
        raise TraitError(f"trait {shortened(text)}: say which pole, {name}+ or {name}-")
    if name in EVERYDAY and not sign:
        pole = EVERYDAY[name]
        return TraitSpec(pole[:-1], "+" if pole[-1] == "+" else "-", strength)
    if name in EVERYDAY:
        raise TraitError(f"trait {shortened(text)}: {shortened(name)} already means {EVERYDAY[name]}; drop the sign")
    raise TraitError(f"trait {shortened(text)}: unknown; {_nearest(name, sign)}")


def parse_trait_name(text: str) -> str:
    """Read the name of a whole trait, both poles, as ``identify`` takes it; a pole's sign is ignored.

    Raises:
        TraitError: the name is not known.
    """
    name = text.strip().lower()
    if name in FACETS:
        return name
    return parse_trait(text).trait


def _strength(text: str, value: str | None) -> float:
    if value is None:
        return 1.0
    try:
        strength = float(value)
    except ValueError:
        strength = math.nan
    if not (math.isfinite(strength) and strength > 0):
        raise TraitError(
            f"trait {shortened(text)}: the strength {shortened(value)} must be a number above 0, such as 0.5"
        )
    return strength


def _nearest(name: str, sign: str) -> str:
    known = [*FACETS, *EVERYDAY]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        return "npti-export traits lists what there is"
    return f"did you mean {close[0] + (sign if close[0] in FACETS else '')!r}? (npti-export traits lists all)"
