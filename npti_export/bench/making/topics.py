"""What questions are about, and the details that make one order's questions differ from another's."""

from __future__ import annotations

import random
from pathlib import Path

from npti_export.errors import BenchError, shortened

TOPICS = (
    "work", "family", "friends", "travel", "money", "health", "study", "home", "chance encounters", "online life",
    "food", "hobbies", "love", "neighbours",
)  # fmt: skip
"""Those of the shipped bench (``data/README.md``)."""

_MOST_TOPICS, _LONGEST_TOPIC = 1000, 80

_PLACES = (
    "a kitchen", "a stairwell", "a late bus", "a waiting room", "a market stall", "a car park", "a hotel corridor",
    "a school hall", "a ferry", "a repair shop", "an allotment", "a library", "a hospital ward", "a campsite",
    "a small office", "a warehouse", "a video call", "a group chat", "a bakery queue", "a swimming pool", "a wedding",
    "a border crossing", "a shared flat", "a farm", "a museum", "a train compartment", "a playground", "a gym",
    "a town hall", "a beach", "a workshop", "a café terrace", "a lift", "a mountain hut", "a laundrette", "a rooftop",
    "a village shop", "a sports ground", "a pharmacy", "a garden", "a lecture room", "an airport gate", "a choir",
    "a canteen", "a cellar", "a night shift", "a holiday home", "a street corner", "a funeral", "a birthday party",
)  # fmt: skip
_PEOPLE = (
    "a former classmate", "a new colleague", "an uncle", "a stranger", "a landlady", "a teenager", "a nurse",
    "a neighbour's child", "an old friend", "a team leader", "a cousin", "a shop assistant", "a grandmother",
    "a cyclist", "a flatmate", "a teacher", "a customer", "a sister", "a caretaker", "a couple", "a driver",
    "a newcomer", "a stepfather", "a musician", "a competitor", "a godchild", "a guest", "a clerk", "nobody else",
    "a whole group", "an apprentice", "a translator", "a coach", "a brother-in-law", "a pensioner", "a tourist",
    "a vet", "a gardener", "a student", "a retired judge", "twins", "a volunteer", "a manager", "a baker",
)  # fmt: skip
_TURNS = (
    "a plan falls through", "something is left unsaid", "an invitation arrives", "a mistake comes to light",
    "time is short", "a favour is asked", "there is money at stake", "the weather turns", "a rule gets in the way",
    "somebody is late", "a choice between two good things", "an old promise", "something breaks", "a long wait",
    "a piece of good news", "a rumour", "a first day", "a last day", "nothing much happens", "a compliment",
    "a complaint", "an unexpected gift", "a lost object", "a change of routine", "an offer with a catch",
    "a disagreement", "a small success", "an empty afternoon", "an unfamiliar custom", "a request to speak",
    "somebody needs help", "a surprise visit", "a decision by tonight", "an unfinished task", "a secret",
    "a noise at night", "a photograph", "a competition", "a broken machine", "an apology",
)  # fmt: skip
_SIDES = (
    "among friends", "among strangers", "at work", "alone at home", "under pressure", "on a free day", "in conflict",
    "in conversation", "when plans change", "when things go well", "when things go wrong", "in the way they talk",
    "in what they think about", "in how they decide", "in how others see them", "in their habits", "in groups",
    "towards family", "towards the unknown", "in what they enjoy", "in what they avoid", "in how they write",
    "when they are asked for advice", "when nobody watches",
)  # fmt: skip


def situations(rng: random.Random, count: int) -> list[str]:
    """``count`` different hints at a situation: a place, somebody, a turn; 88,000 combinations."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[f"{rng.choice(_PLACES)}; {rng.choice(_PEOPLE)}; {rng.choice(_TURNS)}"] = None
    return list(drawn)


def sides(rng: random.Random, count: int) -> list[str]:
    """``count`` hints at what a persona's description may dwell on; pairs, which repeat beyond 276 of them."""
    return [" and ".join(rng.sample(_SIDES, 2)) for _ in range(count)]


def read_topics(path: Path) -> tuple[str, ...]:
    """Read topics, one a line; empty lines and lines that begin with ``#`` are left out.

    Raises:
        BenchError: unreadable, empty, too many, one too long, or one named twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror}); --topics takes a text file") from error
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        topic = line.strip()
        if not topic or topic.startswith("#"):
            continue
        if len(topic) > _LONGEST_TOPIC or not topic.isprintable():
            raise BenchError(f"{path}:{number}: {shortened(topic)} is no topic; give at most {_LONGEST_TOPIC} letters")
        if topic in seen:
            raise BenchError(f"{path}:{number}: {shortened(topic)} is in line {seen[topic]} already; remove one")
        seen[topic] = number
    if not seen or len(seen) > _MOST_TOPICS:
        raise BenchError(f"{path}: holds {len(seen)} topics; give 1 to {_MOST_TOPICS}, one a line")
    return tuple(seen)
