"""Texts that say nearly the same: many of their runs of three words are the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LIMIT = 0.4  # of the shorter text's runs; the shipped bench keeps below it
_RUN = 3  # words
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class Near:
    """A text that repeats another one.

    Attributes:
        text: its place in the list.
        other: the place of the other one, which is not shorter.
        share: of its runs of three words that the other one has, too, in (0, 1].
    """

    text: int
    other: int
    share: float


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def runs(text: str) -> frozenset[int]:
    """The runs of three words in a text, hashed to 64 bits; of a shorter text it is the whole one."""
    found = words(text)
    last = max(1, len(found) - _RUN + 1)
    return frozenset(hash(" ".join(found[start : start + _RUN])) for start in range(last))


def near_duplicates(texts: Sequence[str], limit: float = LIMIT) -> list[Near]:
    """Texts of whose runs more than ``limit`` are in another one, which is at least as long; one entry a text.

    What is left once all of these are taken out has no two such texts. Longest first, each is compared with those that
    stay; a pair is found by the text's rarer runs alone, as too few to matter are left beyond these (prefix filtering:
    Chaudhuri et al., "A Primitive Operator for Similarity Joins in Data Cleaning", 2006).
    """
    grams = [runs(text) for text in texts]
    often = Counter(gram for one in grams for gram in one)
    stays: dict[int, list[int]] = {}
    found = []
    for place in sorted(range(len(texts)), key=lambda one: (-len(grams[one]), one)):
        own = grams[place]
        needed = int(limit * len(own)) + 1
        rare = sorted(own, key=lambda gram: (often[gram], gram))[: len(own) - needed + 1]
        shared = Counter(other for gram in rare for other in stays.get(gram, ()))
        for other, _ in shared.most_common():
            common = len(own & grams[other])
            if common >= needed:
                found.append(Near(place, other, common / len(own)))
                break
        else:
            for gram in own:
                stays.setdefault(gram, []).append(place)
    return sorted(found, key=lambda near: near.text)
