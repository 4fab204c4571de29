"""The checks of ``bench lint``, each a function of a bench; :data:`CHECKS` lists them.

Limits without a source are ours: chosen so that the shipped bench keeps them with room to spare.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Literal, TypeVar

from npti_export.bench import (
    PERSONAS,
    PERSONS,
    QUESTIONS,
    SPLITS,
    Persona,
    Question,
    TraitBench,
    load_bench,
)
from npti_export.bench.lines import PLACEHOLDER
from npti_export.bench.overlap import near_duplicates, words
from npti_export.errors import shortened
from npti_export.traits import FACETS, SIGNS

# As few as that, and single texts decide which neurons are selected: identify asks 32 questions in any case.
FEW_PERSONAS = 12  # a pole
FEW_QUESTIONS = {"search": 48, "test": 16}
_FACET_RATIO = 2.0  # of the most to the least frequent facet
_TOPIC_RATIO = 4.0
_TOPIC_MEAN = 4  # items a topic on average, below which chance alone makes larger ratios
_RARE_PERSON = 0.1  # of the tagged questions
_SHORT_QUESTION, _SHORT_PERSONA = 5, 8  # words
_OUTLIER = 2.5  # times the median length, or less than the median divided by it
_POLE_LENGTHS = 1.25  # ratio of mean words
_YOU = re.compile(r"\byou(rs?|rself|['’](re|ve|d|ll))?\b", re.IGNORECASE)
_ASKING = """
advise answer argue ask compare complete compose continue decide describe discuss draft explain finish give help imagine
introduce invent justify let list make name offer outline paint persuade picture pitch plan pretend propose put reply
report respond review say sell share show sketch suggest sum summarise summarize take talk teach tell translate walk
warn welcome wish write
"""
# A sentence or clause that begins with one of these.
_REQUEST = re.compile(
    rf"(?:^|[.!;:,–—]\s+|\n)[\"'“‘]?(?:(?:please|now|then|and)\s+)*(?:{'|'.join(_ASKING.split())})\b", re.IGNORECASE
)

Item = TypeVar("Item", Persona, Question)


@dataclass(frozen=True)
class Weakness:
    """What a check found: ``file`` is one of the bench's, ``line`` 0 if it is about all of it."""

    severity: Literal["warning", "note"]
    file: str
    line: int
    text: str
    mend: str


def too_few(bench: TraitBench) -> Iterator[Weakness]:
    """Fewer personas or questions than results can rest on."""
    for sign in SIGNS:
        count = len(bench.pole(sign))
        if 0 < count < FEW_PERSONAS:
            text = (
                f"{count} personas of pole {sign}; the shipped traits have {_shipped(lambda one: len(one.pole(sign)))}"  # noqa: B023
            )
            yield Weakness("warning", PERSONAS, 0, text, f"write {FEW_PERSONAS} or more a pole")
    for name, few in FEW_QUESTIONS.items():
        count = len(bench.split(name))
        if 0 < count < few:
            text = f"{count} {name} questions; the shipped traits have {_shipped(lambda one: len(one.split(name)))}"  # noqa: B023
            yield Weakness("warning", QUESTIONS, 0, text, f"write {few} or more (npti-export bench build can help)")


def _shipped(count: Callable[[TraitBench], int]) -> str:
    counts = [count(load_bench(trait)) for trait in FACETS]
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def imbalance(bench: TraitBench) -> Iterator[Weakness]:
    """Facets, topics or persons that are much rarer than others."""
    facets = bench.definition.facet_names
    for sign in SIGNS:
        yield from _rare_facets(f"personas of pole {sign}", PERSONAS, [one.facet for one in bench.pole(sign)], facets)
    for name in SPLITS:
        questions, kind = bench.split(name), f"{name} questions"
        yield from _rare_facets(kind, QUESTIONS, [one.facet for one in questions], facets)
        topics = Counter(one.topic for one in questions if one.topic is not None)
        if topics and topics.total() >= _TOPIC_MEAN * len(topics):
            (most, often), (least, seldom) = topics.most_common(1)[0], topics.most_common()[-1]
            if often > _TOPIC_RATIO * seldom:
                text = f"{kind}: topic {shortened(most)} has {often}, {shortened(least)} only {seldom}"
                yield Weakness("note", QUESTIONS, 0, text, f"write more about {shortened(least)}")
        persons = Counter(one.person for one in questions if one.person is not None)
        rare = [one for one in PERSONS if persons[one] < _RARE_PERSON * persons.total()]
        if rare:
            text = f"{kind}: {' and '.join(rare)} person in less than {_RARE_PERSON:.0%} of those that say it"
            yield Weakness("note", QUESTIONS, 0, text, "write some from other points of view")


def _rare_facets(kind: str, file: str, tags: Sequence[str | None], facets: Sequence[str]) -> Iterator[Weakness]:
    counts = Counter(tag for tag in tags if tag is not None)
    if not counts:
        return
    most, least = max(facets, key=counts.__getitem__), min(facets, key=counts.__getitem__)
    if counts[most] > _FACET_RATIO * counts[least]:
        seldom = f"only {counts[least]}" if counts[least] else "none"
        text = f"{kind}: facet {most!r} has {counts[most]}, {least!r} {seldom}"
        yield Weakness("warning", file, 0, text, f"write more for {least!r}, or take some of {most!r} out")


def repeats(bench: TraitBench) -> Iterator[Weakness]:
    """Texts that say nearly what another one says; worst between search and test."""
    personas, questions = _written(bench.personas), _written(bench.questions)
    for near in near_duplicates([one.text for one in questions]):
        one, other = questions[near.text], questions[near.other]
        text = f"{near.share:.0%} of its runs of three words are in line {other.line}, too: {shortened(one.text)}"
        if one.split != other.split:
            text = f"a {one.split} question repeats a {other.split} one: {text}"
        yield Weakness("warning", QUESTIONS, one.line, text, "write it anew or remove it")
    for near in near_duplicates([one.text for one in personas]):
        first, second = personas[near.text], personas[near.other]
        where = "" if first.pole == second.pole else ", of the other pole"
        text = f"{near.share:.0%} of its runs of three words are in line {second.line}, too{where}"
        yield Weakness("warning", PERSONAS, first.line, text, "write it anew or remove it")


def _written(items: Sequence[Item]) -> list[Item]:
    return [one for one in items if not one.text.lstrip().startswith(PLACEHOLDER)]


def leaks(bench: TraitBench) -> Iterator[Weakness]:
    """Questions that name the trait, a pole, or a forbidden word: the answer would follow the word."""
    definition = bench.definition
    names = [definition.name, *definition.forbidden]
    poles = [definition.poles.high.name, definition.poles.low.name]
    for one in bench.questions:
        text = one.text.lower()
        for name in names:
            if _holds(text, name):
                yield Weakness(
                    "warning", QUESTIONS, one.line, f"names {name!r}: {shortened(one.text)}", "say it otherwise"
                )
        for name in poles:
            if _holds(text, name):
                said = f"holds {name!r}, the name of a pole: {shortened(one.text)}"
                yield Weakness("note", QUESTIONS, one.line, said, "say it otherwise if it means the trait")


def _holds(text: str, name: str) -> bool:
    # Cheap first: of 36,000 questions few hold the name at all.
    start = name.lower().split()[0].split("-")[0]
    if start not in text:
        return False
    spelt = r"[\s-]?".join(map(re.escape, re.split(r"[\s_-]+", name.lower())))
    return re.search(rf"(?<!\w){spelt}(?!\w)", text) is not None


def lengths(bench: TraitBench) -> Iterator[Weakness]:
    """Texts much longer or shorter than the others, and poles whose personas differ in length."""
    yield from _outliers(PERSONAS, _SHORT_PERSONA, bench.personas)
    yield from _outliers(QUESTIONS, _SHORT_QUESTION, bench.questions)
    means = {sign: mean(len(words(one.text)) for one in bench.pole(sign)) for sign in SIGNS if bench.pole(sign)}
    if len(means) == 2 and max(means.values()) > _POLE_LENGTHS * min(means.values()):
        text = f"personas of + have {means['+']:.0f} words on average, of - {means['-']:.0f}"
        yield Weakness("warning", PERSONAS, 0, text, "make the poles alike in length, or length will show as the trait")


def _outliers(file: str, short: int, items: Sequence[Item]) -> Iterator[Weakness]:
    counts = [len(words(one.text)) for one in items]
    middle = median(counts) if counts else 0
    for one, count in zip(items, counts, strict=True):
        if count < short or not middle / _OUTLIER <= count <= middle * _OUTLIER:
            text = f"{count} words, where half of them have {middle:g} or fewer: {shortened(one.text)}"
            yield Weakness("warning", file, one.line, text, "make it as long as the others")


def form(bench: TraitBench) -> Iterator[Weakness]:
    """Questions that ask nothing, and personas that are not addressed as "you"."""
    for question in bench.questions:
        if "?" not in question.text and "？" not in question.text and not _REQUEST.search(question.text):
            text = f"asks nothing: {shortened(question.text)}"
            yield Weakness("warning", QUESTIONS, question.line, text, "end with a question or a request")
    strange = [persona for persona in bench.personas if not _YOU.search(persona.text)]
    if bench.personas and len(strange) == len(bench.personas):
        text = "no persona speaks to 'you'"
        yield Weakness("warning", PERSONAS, 0, text, "write each as 'You are …'; in another language, pay no heed")
        return
    for persona in strange:
        text = f"does not speak to 'you': {shortened(persona.text)}"
        yield Weakness("warning", PERSONAS, persona.line, text, "write it as 'You are …'")


def untagged(bench: TraitBench) -> Iterator[Weakness]:
    """Texts without a facet, topic or person: they are used, but nothing can be balanced or told apart by it."""
    yield from _bare(PERSONAS, bench.personas, ["facet"])
    yield from _bare(QUESTIONS, bench.questions, ["facet", "topic", "person"])


def _bare(file: str, items: Sequence[Item], keys: Sequence[str]) -> Iterator[Weakness]:
    for key in keys:
        bare = [one for one in items if getattr(one, key) is None]
        if bare:
            text = f"{len(bare)} of {len(items)} without {key!r}, the first of them here"
            yield Weakness("note", file, bare[0].line, text, f"add {key!r} where it is known")


CHECKS: dict[str, Callable[[TraitBench], Iterator[Weakness]]] = {
    "too few": too_few,
    "imbalance": imbalance,
    "repeats": repeats,
    "leaks": leaks,
    "lengths": lengths,
    "form": form,
    "untagged": untagged,
}
