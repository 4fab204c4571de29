"""Figures that say how a text reads, from the text alone: does it repeat itself, and how varied is it?

Words are runs of letters and digits, apostrophes inside included, in lower case; where a script is written without
spaces (Chinese, Japanese, Thai, …), each character counts as a word, since only a dictionary could do better.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Thai to Khmer, kana, ideographs: written without spaces between words (Unicode 16, Blocks.txt).
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+(?:['’](?:(?![{_UNSPACED}])[^\W_])+)*")


@dataclass(frozen=True)
class Reading:
    """How one answer reads.

    Attributes:
        repetition: see :func:`repetition`.
        distinct: see :func:`distinct`.
        length: tokens, the one that ends the answer not counted.
    """

    repetition: float
    distinct: float
    length: int


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.casefold().replace("’", "'") for word in _WORD.findall(text)]


def repetition(text: str) -> float:
    """Share of the text's word 3-grams that came before in it, 0 to 1.

    A text of fewer than four words has at most one 3-gram and cannot repeat any: 0.
    """
    return _seen_before(words(text), 3)


def distinct(text: str) -> float:
    """Different word bigrams as a share of all, 0 to 1 (distinct-2; Li et al., NAACL 2016, arXiv 1510.03055).

    A text of fewer than two words has no bigram and repeats none: 1. Long texts have lower figures than short ones,
    so compare answers that were cut at the same length.
    """
    return 1 - _seen_before(words(text), 2)


def reading(text: str, tokens: int) -> Reading:
    """The figures of an answer of so many tokens."""
    return Reading(repetition(text), distinct(text), tokens)


def _seen_before(sequence: Sequence[str], size: int) -> float:
    grams = [tuple(sequence[at : at + size]) for at in range(len(sequence) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
