"""Personas and questions: what a trait is shown by.

A trait is a folder with ``personas.jsonl`` (``pole``, ``facet``, ``text``) and ``questions.jsonl`` (``split``,
``facet``, ``topic``, ``text``); see ``data/README.md``.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npti_export.errors import BenchError
from npti_export.traits import FACETS, Sign


@dataclass(frozen=True)
class Persona:
    """A description of somebody at one pole of a trait, addressed as "you"."""

    pole: Sign
    facet: str
    text: str


@dataclass(frozen=True)
class Question:
    """An everyday situation with an open question. ``search`` ones find neurons, ``test`` ones judge the result."""

    split: str
    facet: str
    topic: str
    text: str


@dataclass(frozen=True)
class TraitBench:
    """Everything that shows one trait. ``digest`` identifies its content."""

    trait: str
    personas: tuple[Persona, ...]
    questions: tuple[Question, ...]
    digest: str

    def pole(self, sign: Sign) -> tuple[Persona, ...]:
        """The personas of one pole."""
        return tuple(persona for persona in self.personas if persona.pole == sign)

    def search(self, count: int = 0, seed: int = 0) -> tuple[Question, ...]:
        """Search questions in seeded order, ``count`` of them spread over the facets; 0 takes all.

        Raises:
            BenchError: more are asked for than there are.
        """
        return self._pick("search", count, seed)

    def test(self, count: int = 0, seed: int = 0) -> tuple[Question, ...]:
        """Held-out test questions, picked like :meth:`search`."""
        return self._pick("test", count, seed)

    def _pick(self, split: str, count: int, seed: int) -> tuple[Question, ...]:
        pool = [question for question in self.questions if question.split == split]
        if count > len(pool):
            raise BenchError(f"{self.trait}: {count} {split} questions asked for, the bench has {len(pool)}")
        rng = random.Random(f"{self.trait}/{split}/{seed}")
        by_facet: dict[str, list[Question]] = {}
        for question in pool:
            by_facet.setdefault(question.facet, []).append(question)
        for questions in by_facet.values():
            rng.shuffle(questions)
        # One of each facet in turn, so that any prefix is balanced.
        rounds = max(map(len, by_facet.values()))
        order = [questions[turn] for turn in range(rounds) for questions in by_facet.values() if turn < len(questions)]
        return tuple(order[: count or len(order)])


def load_bench(trait: str, folder: Path | None = None) -> TraitBench:
    """Read the bench of a trait.

    Args:
        trait: one of the Big Five.
        folder: holds ``personas.jsonl`` and ``questions.jsonl``; None takes the shipped bench.

    Raises:
        BenchError: a file is missing, empty or malformed; file and line are named.
    """
    folder = folder or Path(__file__).parent / "data" / trait
    digest = hashlib.sha256()
    personas = [
        Persona(*_fields(where, item, {"pole": ("+", "-"), "facet": FACETS[trait], "text": None}))
        for where, item in _lines(folder / "personas.jsonl", digest)
    ]
    questions = [
        Question(
            *_fields(
                where,
                item,
                {"split": ("search", "test"), "facet": FACETS[trait], "topic": None, "text": None},
            )
        )
        for where, item in _lines(folder / "questions.jsonl", digest)
    ]
    for sign in ("+", "-"):
        if not any(persona.pole == sign for persona in personas):
            raise BenchError(f"{folder / 'personas.jsonl'}: no persona of pole {sign!r}")
    for split in ("search", "test"):
        if not any(question.split == split for question in questions):
            raise BenchError(f"{folder / 'questions.jsonl'}: no question of split {split!r}")
    return TraitBench(trait, tuple(personas), tuple(questions), digest.hexdigest())


def pair_with_personas(bench: TraitBench, sign: Sign, count: int, seed: int) -> tuple[Persona, ...]:
    """Personas for ``count`` questions: a seeded shuffle, gone round as often as needed, so all are used evenly."""
    personas = list(bench.pole(sign))
    random.Random(f"{bench.trait}{sign}/{seed}").shuffle(personas)
    return tuple(personas[index % len(personas)] for index in range(count))


def _lines(path: Path, digest: Any) -> list[tuple[str, dict[str, Any]]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from error
    digest.update(data)
    items = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise BenchError(f"{path}:{number}: not a JSON object ({error})") from error
        if not isinstance(item, dict):
            raise BenchError(f"{path}:{number}: not a JSON object")
        items.append((f"{path}:{number}", item))
    if not items:
        raise BenchError(f"{path}: is empty; it needs one JSON object a line")
    return items


def _fields(where: str, item: dict[str, Any], schema: dict[str, tuple[str, ...] | None]) -> list[Any]:
    if set(item) != set(schema):
        raise BenchError(f"{where}: has keys {sorted(item)}, needs {sorted(schema)}")
    for key, allowed in schema.items():
        value = item[key]
        if not isinstance(value, str) or not value.strip():
            raise BenchError(f"{where}: {key!r} must be a non-empty string")
        if allowed is not None and value not in allowed:
            raise BenchError(f"{where}: {key!r} is {value!r}, must be one of {', '.join(allowed)}")
    return [item[key] for key in schema]
