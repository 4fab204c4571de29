"""Near-duplicates are those that a plain comparison of all pairs finds, and are found quickly."""

import itertools
import random
import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from npti_export.bench.overlap import LIMIT, near_duplicates


def runs(text):
    """Reference: sets of tuples of three words."""
    tokens = re.findall(r"\w+", text.lower())
    return {tuple(tokens[place : place + 3]) for place in range(max(1, len(tokens) - 2))}


def near(one, other):
    shared, shorter = len(runs(one) & runs(other)), min(len(runs(one)), len(runs(other)))
    return shared / shorter > LIMIT


TEXTS = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join), max_size=12)


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_as_all_pairs_say(texts):
    found = near_duplicates(texts)
    gone = {one.text for one in found}
    for one in found:
        mine, others = runs(texts[one.text]), runs(texts[one.other])
        assert one.other not in gone
        assert len(others) >= len(mine)
        assert one.share == len(mine & others) / len(mine) > LIMIT
    left = [text for place, text in enumerate(texts) if place not in gone]
    assert not any(near(one, other) for one, other in itertools.combinations(left, 2))
    lonely = [a for a, text in enumerate(texts) if not any(near(text, texts[b]) for b in range(len(texts)) if a != b)]
    assert not gone & set(lonely)


def test_case_and_punctuation_do_not_count():
    (one,) = near_duplicates(["Who, then, is THERE at the door?", "who then is there at the door and why"])
    assert (one.text, one.other, one.share) == (0, 1, 1.0)


def test_thousands_of_questions_in_seconds():
    rng = random.Random(0)
    words = [f"w{number}" for number in range(4000)]
    texts = [" ".join(rng.choices(words, k=25)) + " what do you do next" for _ in range(20_000)]
    texts[123] = texts[15_000][:-5]
    start = time.monotonic()
    found = near_duplicates(texts)
    assert [(one.text, one.other) for one in found] == [(123, 15_000)]
    assert time.monotonic() - start < 30  # 3 s on an idle core; comparing all pairs takes many minutes
