"""How many personas and questions there are, of which kinds, and samples of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from npti_export.bench import Persona, Question, TraitBench
from npti_export.errors import BenchError
from npti_export.traits import SIGNS

By = Literal["facet", "topic", "person"]


def counts(bench: TraitBench) -> dict[str, Any]:
    """``{"personas": {"+": n, "-": n}, "search": n, "test": n}``."""
    personas = {sign: len(bench.pole(sign)) for sign in SIGNS}
    return {"personas": personas, "search": len(bench.split("search")), "test": len(bench.split("test"))}


def balance(bench: TraitBench, by: By) -> list[tuple[str | None, dict[str, int]]]:
    """How many there are by facet, topic or person: rows of a value and its counts, ``+``, ``-``, ``search``, ``test``.

    Facets come in the order of the definition, others by name, untagged ones (None) last. Personas have a facet only.
    """
    groups: dict[str, Sequence[Persona] | Sequence[Question]] = {
        **({sign: bench.pole(sign) for sign in SIGNS} if by == "facet" else {}),
        "search": bench.split("search"),
        "test": bench.split("test"),
    }
    found = {name: Counter(getattr(one, by) for one in group) for name, group in groups.items()}
    values = {value for counter in found.values() for value in counter}
    named = sorted(value for value in values if value is not None)
    order: list[str | None] = [*bench.definition.facet_names] if by == "facet" else [*named]
    if None in values:
        order.append(None)
    return [(value, {name: counter[value] for name, counter in found.items()}) for value in order]


def sample_questions(
    bench: TraitBench, count: int, seed: int, split: str | None = None, facet: str | None = None
) -> list[Question]:
    """Some questions at random, in the order of the file; all if there are fewer.

    Raises:
        BenchError: the trait has no such facet, or there is no such question.
    """
    pool = [one for one in bench.questions if split in (None, one.split) and _of_facet(bench, one, facet)]
    return _sample(pool, count, f"{bench.trait}/{split}/{facet}/{seed}")


def sample_personas(bench: TraitBench, count: int, seed: int, facet: str | None = None) -> list[Persona]:
    """Some personas at random, likewise."""
    pool = [one for one in bench.personas if _of_facet(bench, one, facet)]
    return _sample(pool, count, f"{bench.trait}/{facet}/{seed}")


def _of_facet(bench: TraitBench, one: Persona | Question, facet: str | None) -> bool:
    if facet is not None and facet not in bench.definition.facet_names:
        raise BenchError(f"--facet {facet!r}: {bench.trait} has {', '.join(bench.definition.facet_names)}")
    return facet is None or one.facet == facet


def _sample(pool: list[Any], count: int, seed: str) -> list[Any]:
    if not pool:
        raise BenchError("nothing to show: no item is of that split and facet")
    return sorted(random.Random(seed).sample(pool, min(count, len(pool))), key=lambda one: one.line)
