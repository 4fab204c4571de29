"""Personas and questions: what a trait is shown by.

A trait is a folder with ``trait.toml`` (:mod:`npti_export.bench.definition`), ``personas.jsonl`` and
``questions.jsonl``; their lines are described in ``data/README.md``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npti_export.bench.balance import balanced_order
from npti_export.bench.definition import FILE_NAME, TraitDefinition, placeholders, read_definition
from npti_export.bench.lines import PLACEHOLDER, Fault, Schema, read_bytes, read_lines
from npti_export.errors import BenchError
from npti_export.traits import FACETS, SIGNS, Sign

PERSONAS, QUESTIONS = "personas.jsonl", "questions.jsonl"
SPLITS = ("search", "test")
PERSONS = ("first", "second", "third")
_SCORING = 6  # personas a pole that score answers: one a facet, in the shipped bench


@dataclass(frozen=True)
class Persona:
    """A description of somebody at one pole of a trait, addressed as "you".

    Attributes:
        pole: ``+`` or ``-``.
        text: the description.
        facet: side of the trait that it shows; None where nobody said.
        source: where it came from, as the file says; nothing depends on it.
        line: of the file, from 1.
    """

    pole: Sign
    text: str
    facet: str | None = None
    source: dict[str, Any] | None = field(default=None, compare=False)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Question:
    """An everyday situation with an open question.

    Attributes:
        split: ``search`` ones find neurons, ``test`` ones judge the result.
        text: the question.
        facet: side of the trait that it touches; None where nobody said.
        topic: part of life, likewise.
        person: ``first``, ``second`` or ``third``: whose the situation is, likewise.
        source: where it came from, as the file says; nothing depends on it.
        line: of the file, from 1.
    """

    split: str
    text: str
    facet: str | None = None
    topic: str | None = None
    person: str | None = None
    source: dict[str, Any] | None = field(default=None, compare=False)
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class TraitBench:
    """Everything that shows one trait.

    Attributes:
        trait: its name.
        personas: of both poles.
        questions: of both splits.
        digest: SHA-256 of the two files and of what the definition says.
        definition: its poles and facets.
        folder: where it was read.
    """

    trait: str
    personas: tuple[Persona, ...]
    questions: tuple[Question, ...]
    digest: str
    definition: TraitDefinition
    folder: Path

    def pole(self, sign: Sign) -> tuple[Persona, ...]:
        """The personas of one pole."""
        return tuple(persona for persona in self.personas if persona.pole == sign)

    def split(self, name: str) -> tuple[Question, ...]:
        """The questions of one split, in the order of the file."""
        return tuple(question for question in self.questions if question.split == name)

    def search(self, count: int = 0, seed: int = 0) -> tuple[Question, ...]:
        """Search questions in a seeded order of which any beginning is balanced; ``count`` of them, 0 takes all.

        Raises:
            BenchError: more are asked for than there are.
        """
        return self._pick("search", count, seed)

    def test(self, count: int = 0, seed: int = 0) -> tuple[Question, ...]:
        """Held-out test questions, picked like :meth:`search`."""
        return self._pick("test", count, seed)

    def _pick(self, split: str, count: int, seed: int) -> tuple[Question, ...]:
        pool = self.split(split)
        if count > len(pool):
            raise BenchError(f"{self.trait}: {count} {split} questions asked for, the bench has {len(pool)}")
        order = balanced_order(pool, f"{self.trait}/{split}/{seed}")
        return tuple(order[: count or len(order)])


def shipped_folder(trait: str) -> Path:
    """Where the shipped bench of one of the Big Five is."""
    return Path(__file__).parent / "data" / trait


def definition_of(trait: str, folder: Path) -> TraitDefinition:
    """The definition of a trait: the folder's own, or the shipped one where a folder for one of the Big Five has none.

    Raises:
        BenchError: there is none, it is malformed, or it is of another trait.
    """
    if trait in FACETS and not (folder / FILE_NAME).is_file():
        return read_definition(shipped_folder(trait))
    definition = read_definition(folder)
    if definition.name != trait:
        raise BenchError(f"{folder / FILE_NAME}: 'name' is {definition.name!r}, and {trait!r} is expected here")
    return definition


def read_personas(data: bytes, folder: Path, definition: TraitDefinition, faults: list[Fault]) -> list[Persona]:
    """The personas of a file's content; bad lines go to ``faults``."""
    path = folder / PERSONAS
    schema = Schema({"pole": SIGNS, "text": None}, {"facet": definition.facet_names})
    return [Persona(**item, line=number) for number, item in read_lines(path, data, schema, faults)]


def read_questions(data: bytes, folder: Path, definition: TraitDefinition, faults: list[Fault]) -> list[Question]:
    """The questions of a file's content; bad lines go to ``faults``."""
    path, optional = folder / QUESTIONS, {"facet": definition.facet_names, "topic": None, "person": PERSONS}
    schema = Schema({"split": SPLITS, "text": None}, optional)
    return [Question(**item, line=number) for number, item in read_lines(path, data, schema, faults)]


def missing_parts(bench: TraitBench) -> list[Fault]:
    """What a trait cannot be used without, and what ``bench new`` wrote and nobody has replaced."""
    folder = bench.folder
    unwritten = placeholders(bench.definition)
    faults = [
        Fault(folder / FILE_NAME, 0, f"{field!r} is still a {PLACEHOLDER.lower()}; write it") for field in unwritten
    ]
    groups: tuple[tuple[str, Sequence[Persona | Question]], ...] = (
        (PERSONAS, bench.personas),
        (QUESTIONS, bench.questions),
    )
    faults += [
        Fault(folder / name, one.line, f"is still a {PLACEHOLDER.lower()}; write it or remove the line")
        for name, group in groups
        for one in group
        if one.text.lstrip().startswith(PLACEHOLDER)
    ]
    faults += [Fault(folder / PERSONAS, 0, f"no persona of pole {sign!r}") for sign in SIGNS if not bench.pole(sign)]
    faults += [
        Fault(folder / QUESTIONS, 0, f"no question of split {name!r}") for name in SPLITS if not bench.split(name)
    ]
    return faults


def load_bench(trait: str, folder: Path | None = None) -> TraitBench:
    """Read the bench of a trait.

    Args:
        trait: one of the Big Five, or the trait that the folder defines.
        folder: holds ``personas.jsonl`` and ``questions.jsonl``, and ``trait.toml``, which one for a trait of the Big
            Five may lack; None takes the shipped bench.

    Raises:
        BenchError: a file is missing, empty or malformed, or holds placeholders; file and line are named.
    """
    if folder is None and trait not in FACETS:
        raise BenchError(f"{trait}: is none of the Big Five; name the folder that defines it, as in ./{trait}+")
    folder = folder or shipped_folder(trait)
    definition = definition_of(trait, folder)
    bench, faults = read_bench(definition, folder)
    faults = faults or missing_parts(bench)
    if faults:
        more = f" (and {len(faults) - 1} more; npti-export bench lint lists all)" if len(faults) > 1 else ""
        raise BenchError(f"{faults[0]}{more}")
    return bench


def read_bench(definition: TraitDefinition, folder: Path) -> tuple[TraitBench, list[Fault]]:
    """What is good in a trait's folder, even if it is not enough to be used, and its bad lines.

    Raises:
        BenchError: a file cannot be read.
    """
    faults: list[Fault] = []
    data = [read_bytes(folder / name) for name in (PERSONAS, QUESTIONS)]
    digest = hashlib.sha256(definition.digest.encode())
    for content in data:
        digest.update(hashlib.sha256(content).digest())
    personas = read_personas(data[0], folder, definition, faults)
    questions = read_questions(data[1], folder, definition, faults)
    name = definition.name
    return TraitBench(name, tuple(personas), tuple(questions), digest.hexdigest(), definition, folder), faults


def pair_with_personas(bench: TraitBench, sign: Sign, count: int, seed: int) -> tuple[Persona, ...]:
    """Personas for ``count`` questions: a seeded shuffle, gone round as often as needed, so all are used evenly.

    Those of :func:`scoring_personas` stay out of it, so that no answer is scored under what it was made by; an only
    persona has to do both.
    """
    scores = {persona.text for persona in scoring_personas(bench, sign, seed)}
    order = _persona_order(bench, sign, seed)
    personas = [persona for persona in order if persona.text not in scores] or order
    return tuple(personas[index % len(personas)] for index in range(count))


def scoring_personas(bench: TraitBench, sign: Sign, seed: int) -> tuple[Persona, ...]:
    """The personas of a pole that answers are scored under: one of each facet, the last in a seeded order.

    Few, so that what they add to a prompt is computed once for all questions, and no more than half of all.
    """
    order, facets = _persona_order(bench, sign, seed)[::-1], set[str]()
    chosen = []
    for persona in order:
        if persona.facet is None or persona.facet not in facets:
            chosen.append(persona)
            facets |= {persona.facet} if persona.facet else set()
    return tuple(chosen[: max(1, min(_SCORING, len(order) // 2))])


def _persona_order(bench: TraitBench, sign: Sign, seed: int) -> list[Persona]:
    order = list(bench.pole(sign))
    random.Random(f"{bench.trait}{sign}/{seed}").shuffle(order)
    return order
