"""What an item must be to be kept, one small function a rule, in one list for questions and one for personas."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from npti_export.bench.making.plan import Plan
from npti_export.bench.making.prompts import forbidden_words

# The commonest English words that are not also common words of the languages written most like it.
_ENGLISH = frozenset(
    """
    a about after all an and any are as at back be because been before being but by can could did do does doing
    down each even every feel few first for from get go goes going had has have he her hers him his how i if in
    into is it its just keep knows last later left like little long make makes me more most much my need new
    next no not now of off on one only or other our out over own people really right said say says see she
    should so some somebody someone something still take than that the their them then there these they thing
    things think this those three through time to too two under until up us very want wants was way we were what
    when where which while who why will with without would you your yours yourself
    """.split()  # noqa: SIM905 - one word a line would be a page
)
_LEAST_ENGLISH = 0.25  # share of those words: lowest among the shipped questions 0.33; at most 0.2 in German, French
_MOST_FOREIGN = 0.1  # share of letters outside the Latin script: names in other scripts are rare and short
_MARKUP = re.compile(r"[<>{}\[\]|`#*_~\\]|https?:|\*\*")
_REMAINS = re.compile(r"^(?:question|persona|description|hint|answer|note)\b[^.?!]{0,20}:|^\W*\d+[.)]", re.IGNORECASE)
_FIRST = re.compile(r"\b(?:I|I'm|I've|I'd|I'll|[Mm]e|[Mm]y|[Mm]ine|[Mm]yself)\b")
_SECOND = re.compile(r"\b(?:you|your|yours|yourself|you're|you've|you'd|you'll)\b", re.IGNORECASE)
_SPOKEN = re.compile(r"[\"“”„«»][^\"“”„«»]*[\"“”„«»]")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class Candidate:
    """An item that may be kept.

    Attributes:
        text: of it.
        person: in which it was ordered.
        cut: whether the answer broke off in it.
    """

    text: str
    person: str = ""
    cut: bool = False

    @cached_property
    def words(self) -> list[str]:
        """Its words, as they are."""
        return _WORD.findall(self.text)

    @cached_property
    def narrated(self) -> str:
        """The text without what somebody in it says, typographic apostrophes made plain."""
        return _SPOKEN.sub(" ", self.text).replace("’", "'")


@dataclass(frozen=True)
class Filter:
    """One rule.

    Attributes:
        name: under which rejections are counted.
        fault: what is wrong with a candidate, in a few words, or None.
    """

    name: str
    fault: Callable[[Candidate], str | None]


def filters(plan: Plan) -> tuple[Filter, ...]:
    """The rules that look at one item alone, in order; the first that finds a fault rejects it."""
    languages = (Filter("language", english),) if plan.language == "en" else ()
    length = Filter("length", words_between(*plan.words))
    if plan.what == "personas":
        return (Filter("format", persona_format), *languages, length)
    return (
        Filter("format", question_format),
        *languages,
        length,
        Filter("leakage", without(forbidden_words(plan.definition))),
        Filter("person", told_as_ordered),
    )


def first_fault(candidate: Candidate, rules: tuple[Filter, ...]) -> tuple[str, str] | None:
    """Name of the first rule that rejects a candidate, and the fault."""
    for rule in rules:
        fault = rule.fault(candidate)
        if fault is not None:
            return rule.name, fault
    return None


def _shape(candidate: Candidate) -> str | None:
    text = candidate.text
    if candidate.cut:
        return "the answer broke off in it"
    if not all(char.isprintable() for char in text):
        return "control or invisible characters"
    if _MARKUP.search(text):
        return "markup"
    if _REMAINS.match(text):
        return "a label or number in front"
    if not (text[0].isupper() or text[0].isdigit() or text[0] in "\"“«'‘¿" or not text[0].isascii()):
        return "does not begin like a sentence"
    return None


def question_format(candidate: Candidate) -> str | None:
    """One line of plain text with one question mark, at its end."""
    fault = _shape(candidate)
    if fault is not None:
        return fault
    if not candidate.text.endswith("?"):
        return "does not end with a question"
    if candidate.narrated.count("?") != 1:
        return "more than one question"
    return None


def persona_format(candidate: Candidate) -> str | None:
    """Plain text in whole sentences that speaks to a person as you, and asks nothing."""
    fault = _shape(candidate)
    if fault is not None:
        return fault
    if not candidate.text.endswith((".", "!")):
        return "does not end with a sentence"
    if "?" in candidate.text:
        return "asks a question"
    if not _SECOND.search(candidate.text):
        return "does not speak to somebody as you"
    return None


def english(candidate: Candidate) -> str | None:
    """Latin letters, and enough of the commonest English words."""
    letters = [char for char in candidate.text if char.isalpha()]
    foreign = sum(1 for char in letters if not char.isascii() and "LATIN" not in unicodedata.name(char, ""))
    if foreign > _MOST_FOREIGN * len(letters):
        return "another script"
    common = sum(1 for word in candidate.words if word.lower().replace("’", "'").split("'")[0] in _ENGLISH)
    if common < _LEAST_ENGLISH * len(candidate.words):
        return "not English"
    return None


def words_between(least: int, most: int) -> Callable[[Candidate], str | None]:
    """A rule on the number of words."""

    def fault(candidate: Candidate) -> str | None:
        count = len(candidate.words)
        if count < least:
            return f"shorter than {least} words"
        return f"longer than {most} words" if count > most else None

    return fault


def without(names: tuple[str, ...]) -> Callable[[Candidate], str | None]:
    """A rule against words that give the trait away, as whole words in any case; blanks may be hyphens."""
    spelt = (r"[\s_-]+".join(map(re.escape, re.split(r"[\s_-]+", name))) for name in sorted(names, key=len)[::-1])
    pattern = re.compile(rf"\b(?:{'|'.join(spelt)})\b", re.IGNORECASE)

    def fault(candidate: Candidate) -> str | None:
        match = pattern.search(candidate.text)
        return f"says {match[0].lower()}" if match else None

    return fault


def told_as_ordered(candidate: Candidate) -> str | None:
    """The grammatical person, by pronouns outside quoted speech.

    First: somebody speaks of themselves. Second: the reader is addressed, nobody speaks of themselves. Third: neither,
    except that the closing question may turn to the reader ("What would you tell her?").
    """
    narrated = candidate.narrated
    first, second = _FIRST.search(narrated), _SECOND.search(narrated)
    if candidate.person == "first":
        return None if first else "not told in the first person"
    if first:
        return "told in the first person"
    if candidate.person == "second":
        return None if second else "does not address the reader"
    story = re.split(r"(?<=[.!?])\s", narrated.strip())[:-1]
    return "addresses the reader" if _SECOND.search(" ".join(story)) or not story else None
