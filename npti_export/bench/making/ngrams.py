"""How alike two texts are: the word 3-grams that they share."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from npti_export.bench.overlap import words

Grams = npt.NDArray[np.int64]

# Odd multipliers, one for each place in a 3-gram, so that the words' order counts (the first is Fibonacci hashing's).
_PLACES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def grams(text: str) -> Grams:
    """The distinct word 3-grams of a text as sorted 64-bit hashes ``[n]``; of fewer than three words, all as one.

    Two different 3-grams of a bench of ten million share a hash with probability below 1e-5.
    """
    found = [_word_hash(word) for word in words(text)]
    found += [0] * (3 - len(found))
    hashes = np.array(found, np.uint64)
    count = len(hashes) - 2
    mixed = sum((hashes[at : at + count] * place for at, place in enumerate(_PLACES)), np.zeros(count, np.uint64))
    mixed ^= mixed >> np.uint64(29)  # products leave the low bits weak
    return np.unique((mixed * _PLACES[0]).view(np.int64))


def overlap(one: Grams, other: Grams) -> float:
    """Shared 3-grams over those of the text that has fewer, 0 to 1."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / min(len(one), len(other))
