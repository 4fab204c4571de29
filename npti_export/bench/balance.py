"""An order of questions of which any beginning is balanced over facets, topics and persons."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

_LOOK_AHEAD = 64  # topics compared for the rarest so far; keeps the order linear where each question has its own


class Tagged(Protocol):
    """What tells a question from others; None where nobody said."""

    @property
    def facet(self) -> str | None:
        """Side of the trait."""
        ...

    @property
    def topic(self) -> str | None:
        """Part of life."""
        ...

    @property
    def person(self) -> str | None:
        """``first``, ``second`` or ``third``: whose the situation is."""
        ...


Item = TypeVar("Item", bound=Tagged)


def balanced_order(items: Sequence[Item], seed: str) -> list[Item]:
    """All items, in an order whose every beginning is as balanced as it can be; the same seed gives the same one.

    Facets come in rounds, one item each, in a random order that is new in each round; one that is used up drops out.
    So of any beginning, two facets that still have items differ by one at most. Untagged items are of unknown facets,
    so they take no facet's turn: they are spread over the whole, as many per hundred as there are. Within a facet,
    topics come in rounds likewise; where there is a choice, a person is taken that the facet had least often, and
    then a topic that is rarest so far over all facets.
    """
    rng = random.Random(seed)
    groups: dict[str | None, list[Item]] = {}
    for item in items:
        groups.setdefault(item.facet, []).append(item)
    seen: Counter[str | None] = Counter()
    untagged = _within(groups.pop(None, []), seen, rng)
    tagged = _in_rounds([_within(group, seen, rng) for group in groups.values()], rng)
    share = sum(item.facet is None for item in items) / max(1, len(items))
    order: list[Item] = []
    phase, taken = rng.random(), 0
    for place in range(len(items)):
        # Bresenham's line: after n places, n * share untagged ones to within one, from a random phase
        from_untagged = int((place + 1) * share + phase) > taken
        first, second = (untagged, tagged) if from_untagged else (tagged, untagged)
        item = next(itertools.chain(first, second))  # the phase may make the last untagged one early or late
        taken += item.facet is None
        order.append(item)
    return order


def _in_rounds(groups: Sequence[Iterator[Item]], rng: random.Random) -> Iterator[Item]:
    """One of each group in turn, in an order that is new in each round, until all are used up."""
    left = list(groups)
    while left:
        rng.shuffle(left)
        still = []
        for group in left:
            item = next(group, None)
            if item is not None:
                still.append(group)
                yield item
        left = still


def _within(items: Sequence[Item], seen: Counter[str | None], rng: random.Random) -> Iterator[Item]:
    """The items of one facet; ``seen`` counts topics over all facets."""
    pool: dict[str | None, dict[str | None, list[Item]]] = {}
    for item in rng.sample(items, len(items)):
        pool.setdefault(item.topic, {}).setdefault(item.person, []).append(item)
    persons = list(dict.fromkeys(item.person for item in items))
    rng.shuffle(persons)
    used: Counter[str | None] = Counter()
    while pool:
        waiting = rng.sample(list(pool), len(pool))  # topics that are to come in this round
        by_person = {person: deque(topic for topic in waiting if person in pool[topic]) for person in persons}
        done: set[str | None] = set()
        for _ in range(len(waiting)):
            topic, person = _choice(by_person, done, used, seen)
            item = pool[topic][person].pop()
            done.add(topic)
            used[person] += 1
            seen[topic] += 1
            if not pool[topic][person]:
                del pool[topic][person]
            if not pool[topic]:
                del pool[topic]
            yield item


def _choice(
    by_person: dict[str | None, deque[str | None]],
    done: set[str | None],
    used: Counter[str | None],
    seen: Counter[str | None],
) -> tuple[str | None, str | None]:
    """A topic of this round that is not done yet, and a person that it has: the least used, with the rarest topic."""
    for person in sorted(by_person, key=used.__getitem__):
        topics = by_person[person]
        while topics and topics[0] in done:
            topics.popleft()
        open_ones = [topic for topic in itertools.islice(topics, _LOOK_AHEAD) if topic not in done]
        if open_ones:
            return min(open_ones, key=seen.__getitem__), person
    raise AssertionError("a round has as many items as topics")
