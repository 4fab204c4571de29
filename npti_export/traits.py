"""The Big Five, their poles and facets, and the notation a user types.

``agreeableness+`` is a pole, ``neuroticism-:0.5`` a pole at half strength, ``calm`` an everyday name for
``neuroticism-``, ``./pirate+`` a pole of a trait that a folder defines (:mod:`npti_export.bench.definition`).
Facets are the six IPIP-NEO ones of each trait (paper, section on PersonalityBench).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
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

_NOTATION = re.compile(r"^\s*(?P<name>[A-Za-z][A-Za-z0-9 _-]*?)\s*(?P<sign>[+\-−])?\s*(?::(?P<strength>.*))?$")
# The sign is the last one, as a folder's name may hold others; a strength holds none that could be taken for it.
_PATH = re.compile(r"^\s*(?P<path>.+)(?P<sign>[+\-−])\s*(?::(?P<strength>[^/\\]*))?$", re.DOTALL)
_LONGEST = 200  # characters of a name with its strength; longer ones would keep the pattern busy
_OWN_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


@dataclass(frozen=True)
class TraitSpec:
    """One requested pole.

    Attributes:
        trait: one of the Big Five, or the name of a trait of the user's own.
        sign: of the pole.
        strength: a positive multiplier.
        folder: that defines a trait of the user's own; None for the Big Five, and for a pole that an artifact records.
    """

    trait: str
    sign: Sign
    strength: float = 1.0
    folder: Path | None = None

    @property
    def pole(self) -> str:
        """The pole without its strength, such as ``neuroticism-``."""
        return self.trait + self.sign

    def __str__(self) -> str:
        return self.pole if self.strength == 1.0 else f"{self.pole}:{self.strength!r}"


def parse_trait(text: str, known: Collection[str] = ()) -> TraitSpec:
    """Read ``agreeableness+``, ``neuroticism-:0.5``, an everyday name such as ``calm``, or ``./pirate+``.

    What holds a slash or a backslash, or begins with ``.`` or ``~``, is the path of a trait's folder.

    Args:
        text: what the user typed.
        known: names of traits of the user's own that are understood without a folder.

    Raises:
        TraitError: unknown name (the nearest known one is offered), a trait's name without a sign, an
            everyday name with one, a strength that is not a positive finite number, or no such folder.
        BenchError: the folder's ``trait.toml`` is malformed.
    """
    if _is_path(text):
        return _own_pole(text)
    match = _notation(text)
    if match is None:
        raise TraitError(
            f"trait {shortened(text)}: not of the form NAME+, NAME- or NAME+:STRENGTH; see npti-export traits"
        )
    name, sign = match["name"].lower(), (match["sign"] or "").replace("−", "-")
    strength = _strength(text, match["strength"])
    if (name in FACETS or name in known) and sign:
        return TraitSpec(name, "+" if sign == "+" else "-", strength)
    if name in FACETS or name in known:
        raise TraitError(f"trait {shortened(text)}: say which pole, {name}+ or {name}-")
    if name in EVERYDAY and not sign:
        pole = EVERYDAY[name]
        return TraitSpec(pole[:-1], "+" if pole[-1] == "+" else "-", strength)
    if name in EVERYDAY:
        raise TraitError(f"trait {shortened(text)}: {shortened(name)} already means {EVERYDAY[name]}; drop the sign")
    raise TraitError(f"trait {shortened(text)}: unknown; {_nearest(name, sign)}")


def parse_recorded(text: str) -> TraitSpec:
    """Read a pole that an artifact records: any well-formed name will do, as the folder need not be here.

    Raises:
        TraitError: see :func:`parse_trait`.
    """
    match = None if _is_path(text) else _notation(text)
    if match is None:
        raise TraitError(f"trait {shortened(text)}: not of the form NAME+, NAME- or NAME+:STRENGTH")
    return parse_trait(text, known=[match["name"]] if is_own_name(match["name"]) else ())


def parse_whole(text: str) -> TraitSpec:
    """Read the name or folder of a whole trait, both poles, as ``identify`` takes it; a pole's sign is ignored.

    Returns:
        Its ``+`` pole.

    Raises:
        TraitError: the name is not known, or there is no such folder.
        BenchError: the folder's ``trait.toml`` is malformed.
    """
    name = text.strip().lower()
    if name in FACETS:
        return TraitSpec(name, "+")
    if _is_path(text) and ((folder := _existing(text)) is not None or not _PATH.match(text)):
        return TraitSpec(own_name(folder or Path(text.strip())), "+", folder=folder)
    spec = parse_trait(text)
    return TraitSpec(spec.trait, "+", folder=spec.folder)


def parse_trait_name(text: str) -> str:
    """The name of the trait that :func:`parse_whole` reads."""
    return parse_whole(text).trait


def is_own_name(name: str) -> bool:
    """Whether a trait of the user's own may be called so: no such name is one of ours."""
    return len(name) <= 64 and _OWN_NAME.fullmatch(name) is not None and name not in FACETS and name not in EVERYDAY


def own_name(folder: Path) -> str:
    """The name of the trait that a folder defines.

    Raises:
        TraitError: no such folder, no ``trait.toml`` in it, or it takes one of our names.
        BenchError: its ``trait.toml`` is malformed.
    """
    from npti_export.bench.definition import FILE_NAME, read_definition

    try:
        there, defined = folder.is_dir(), (folder / FILE_NAME).is_file()
    except (OSError, ValueError):
        there = defined = False
    if not there:
        raise TraitError(
            f"trait {shortened(str(folder), 200)}: there is no such folder; npti-export bench new makes one to fill in"
        )
    if not defined:
        raise TraitError(
            f"trait {shortened(str(folder), 200)}: the folder has no {FILE_NAME}, which says what the trait is "
            "(npti-export bench new shows one)"
        )
    name = read_definition(folder).name
    if name in FACETS:
        raise TraitError(
            f"{folder / FILE_NAME}: 'name' is {name!r}, one of the Big Five; choose another name, or use the folder "
            f"above it in place of the shipped bench: --bench {folder.parent} with {name}+"
        )
    if name in EVERYDAY:
        raise TraitError(f"{folder / FILE_NAME}: 'name' is {name!r}, which means {EVERYDAY[name]}; choose another name")
    return name


def _notation(text: str) -> re.Match[str] | None:
    return _NOTATION.match(text) if len(text) <= _LONGEST else None


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.strip()[:1] in (".", "~")


def _existing(text: str) -> Path | None:
    """The folder of that very name, if there is one."""
    try:
        folder = Path(text.strip()).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, no home
        return None


def _own_pole(text: str) -> TraitSpec:
    match = _PATH.match(text)
    if match is None:
        named = text.strip()
        raise TraitError(f"trait {shortened(text, 200)}: say which pole of the folder's trait, such as {named[:100]}+")
    strength = _strength(text, match["strength"])
    folder = _existing(match["path"])
    name = own_name(folder or Path(match["path"].strip()))
    return TraitSpec(name, "+" if match["sign"] == "+" else "-", strength, folder)


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
