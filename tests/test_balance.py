"""Any beginning of the questions is balanced, whatever tags they carry."""

import time
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npti_export.bench import load_bench
from npti_export.bench.balance import balanced_order
from npti_export.traits import FACETS


@dataclass(frozen=True)
class Item:
    facet: str | None
    topic: str | None
    person: str | None
    number: int


TAGS = st.tuples(*(st.sampled_from([*letters, None]) for letters in ("abcd", "uvwxyz", "123")))
POOLS = st.lists(TAGS, max_size=60).map(lambda tags: [Item(*tag, number) for number, tag in enumerate(tags)])
SEEDS = st.text(max_size=3)


def left_over(order, count, key):
    """What is still to come after ``count`` items, by a key."""
    return Counter(key(item) for item in order[count:])


def spread(order, count, key):
    """Largest difference in how often any two values came that are not used up, or that came more often than one."""
    had, left = Counter(map(key, order[:count])), left_over(order, count, key)
    open_ones = [had[value] for value in left]
    return max(had.values(), default=0) - min(open_ones) if open_ones else 0


@given(POOLS, SEEDS)
def test_every_item_comes_once_and_a_seed_gives_one_order(pool, seed):
    order = balanced_order(pool, seed)
    assert sorted(item.number for item in order) == list(range(len(pool)))
    assert order == balanced_order(pool, seed)


@given(POOLS, SEEDS)
def test_facets_that_are_not_used_up_differ_by_one_at_most(pool, seed):
    order = [item for item in balanced_order(pool, seed) if item.facet is not None]
    for count in range(len(order) + 1):
        assert spread(order, count, lambda item: item.facet) <= 1


@given(POOLS, SEEDS)
def test_untagged_items_come_in_their_proportion(pool, seed):
    order = balanced_order(pool, seed)
    share = sum(item.facet is None for item in pool) / max(1, len(pool))
    for count in range(len(order) + 1):
        assert abs(sum(item.facet is None for item in order[:count]) - share * count) <= 1 + 1e-9


@given(POOLS, SEEDS)
def test_topics_within_a_facet_come_in_rounds(pool, seed):
    whole = balanced_order(pool, seed)
    for facet in {item.facet for item in pool}:
        order = [item for item in whole if item.facet == facet]
        for count in range(len(order) + 1):
            assert spread(order, count, lambda item: item.topic) <= 1


@given(st.integers(1, 6), st.integers(1, 5), SEEDS)
def test_persons_within_a_facet_are_even_where_every_topic_has_all(topics, each, seed):
    pool = [
        Item(facet, topic, person, number)
        for facet in "ab"
        for topic in "uvwxyz"[:topics]
        for person in "123"
        for number in range(each)
    ]
    whole = balanced_order(pool, seed)
    for facet in "ab":
        order = [item for item in whole if item.facet == facet]
        # In a facet's last round but the first few, a topic may have one person left only; before that all is even.
        for count in range(topics * (3 * each - 2)):
            had = Counter(item.person for item in order[:count])
            assert max(had.values(), default=0) - min(had.get(person, 0) for person in "123") <= 2


@given(POOLS.filter(bool), SEEDS, st.integers(1, 5))
def test_fewer_questions_than_facets_are_of_different_facets(pool, seed, count):
    order = [item for item in balanced_order(pool, seed) if item.facet is not None]
    few = order[: min(count, len({item.facet for item in order}))]
    assert len({item.facet for item in few}) == len(few)


def test_which_facets_come_first_depends_on_the_seed():
    pool = [Item(facet, None, None, number) for number in range(3) for facet in "abcd"]
    firsts = Counter(balanced_order(pool, str(seed))[0].facet for seed in range(400))
    assert set(firsts) == set("abcd")
    assert min(firsts.values()) > 50  # 100 expected; less than 50 has a probability below 1e-8


def test_a_huge_facet_does_not_drown_the_others():
    pool = [Item("a", None, None, number) for number in range(1000)] + [Item("b", None, None, n) for n in range(5)]
    assert Counter(item.facet for item in balanced_order(pool, "s")[:10]) == {"a": 5, "b": 5}


def test_topics_are_spread_over_facets_too():
    pool = [Item(facet, topic, "1", 0) for facet in "abcd" for topic in "tuvwxyz"]
    for seed in range(20):
        assert len({item.topic for item in balanced_order(pool, str(seed))[:7]}) == 7


@pytest.mark.parametrize("topics", [14, 30_000])
def test_it_is_fast(topics):
    """36,000 questions, also where nearly each has a topic of its own: half a second; were it quadratic, minutes."""
    pool = [Item(f"f{n % 6}", f"t{n % topics}", f"p{n % 3}", n) for n in range(36_000)]
    started = time.process_time()
    assert len(balanced_order(pool, "s")) == 36_000
    assert time.process_time() - started < 10


def test_shipped_questions():
    bench = load_bench("neuroticism")
    for count in (3, 6, 12, 25):
        counts = Counter(question.facet for question in bench.search(count, seed=4))
        assert max(counts.values()) - min(counts.get(facet, 0) for facet in FACETS["neuroticism"]) <= 1
