"""What is asked for: cells, how many items each is to have, and the orders that a round of asking consists of."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from npti_export.bench.definition import TraitDefinition
from npti_export.bench.making.topics import TOPICS
from npti_export.errors import BenchError

What = Literal["questions", "personas"]
PERSONS = ("first", "second", "third")
_MOST_CELLS, _MOST_ITEMS = 100_000, 10_000_000


@dataclass(frozen=True)
class Cell:
    """One combination that items are wanted for. What does not apply is empty.

    Attributes:
        number: its place in the plan.
        facet: of the trait.
        topic: of a question.
        person: in which a question is told.
        pole: of a persona, ``+`` or ``-``.
        quotas: items wanted of each split, by name; personas have the one split ``""``.
    """

    number: int
    facet: str
    topic: str
    person: str
    pole: str
    quotas: tuple[tuple[str, int], ...]

    @property
    def wanted(self) -> int:
        """Items of all splits."""
        return sum(count for _, count in self.quotas)


@dataclass(frozen=True)
class Order:
    """One request to the generator: ``ask`` items for a cell.

    Attributes:
        number: unique within a build, in the order in which results are taken.
        cell: what for.
        ask: how many items.
        seed: of the prompt's details and of the generator; 31 bits.
    """

    number: int
    cell: Cell
    ask: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is asked and what is kept. Two equal plans ask the same.

    Attributes:
        what: questions or personas.
        definition: of the trait.
        sizes: items of each split over all cells; of personas, ``+`` and ``-``.
        model: the generator's name.
        topics: of questions.
        persons: of questions.
        seed: of everything.
        per_request: items asked for at once.
        words: fewest and most words of an item.
        language: ``en`` or ``none``.
        temperature: of the generator.
        judge: name of the model that judges whether the poles would differ; empty for none.

    Raises:
        BenchError: a size that cannot be.
    """

    what: What
    definition: TraitDefinition
    sizes: tuple[tuple[str, int], ...]
    model: str
    topics: tuple[str, ...] = TOPICS
    persons: tuple[str, ...] = PERSONS
    seed: int = 0
    per_request: int = 10
    words: tuple[int, int] = (8, 80)
    language: str = "en"
    temperature: float = 1.0
    judge: str = ""

    def __post_init__(self) -> None:
        total = sum(size for _, size in self.sizes)
        if not 0 < total <= _MOST_ITEMS:
            raise BenchError(f"a plan of {total} items: ask for 1 to {_MOST_ITEMS}")
        cells = len(self.definition.facets) * (len(self.topics) * len(self.persons) if self.what == "questions" else 2)
        if cells > _MOST_CELLS:
            raise BenchError(f"{cells} cells of facet, topic and person are more than {_MOST_CELLS}; give fewer topics")

    def cells(self) -> list[Cell]:
        """The cells that anything is wanted for, every prefix of them spread over facets, topics and persons."""
        return self._question_cells() if self.what == "questions" else self._persona_cells()

    def _question_cells(self) -> list[Cell]:
        rng = random.Random(f"{self.seed}/cells")
        facets, topics, persons = (
            rng.sample(names, len(names)) for names in (self.definition.facet_names, self.topics, self.persons)
        )
        pairs, turn = len(facets) * len(topics), math.lcm(len(facets), len(topics))
        count = pairs * len(persons)
        cells = []
        for rank in range(count):
            # Going round both lists at once meets each pair once before it meets any twice, if one list is moved on
            # by one after each common period.
            pair = rank % pairs
            facet, topic = facets[pair % len(facets)], topics[(pair + pair // turn) % len(topics)]
            person = persons[(pair + pair // len(facets) + rank // pairs) % len(persons)]
            # Of what does not go in evenly, search takes from the front and test from the back.
            places = {"search": rank, "test": count - 1 - rank}
            quotas = tuple((split, _share(size, count, places[split])) for split, size in self.sizes)
            cells.append(Cell(rank, facet, topic, person, "", quotas))
        return [cell for cell in cells if cell.wanted]

    def _persona_cells(self) -> list[Cell]:
        facets = random.Random(f"{self.seed}/cells").sample(self.definition.facet_names, len(self.definition.facets))
        return [
            cell
            for rank, facet in enumerate(facets)
            for side, (pole, size) in enumerate(self.sizes)
            if (cell := Cell(2 * rank + side, facet, "", "", pole, (("", _share(size, len(facets), rank)),))).wanted
        ]

    def round_orders(self, turn: int, first: int, owed: Sequence[tuple[Cell, int]]) -> Iterator[Order]:
        """The orders of one round, cells taking turns; made one by one, since there may be many.

        Args:
            turn: number of the round, from 0 on.
            first: number of its first order.
            owed: items that each cell still lacked when the round began.
        """
        number = first
        for part in range(max((math.ceil(lacks / self.per_request) for _, lacks in owed), default=0)):
            for cell, lacks in owed:
                left = lacks - part * self.per_request
                if left > 0:
                    # A little more than is lacking, as some are rejected; tokens for what nobody needs are money.
                    ask = min(self.per_request, left + 1 + left // 4)
                    yield Order(number, cell, ask, self._seed(cell, turn, part))
                    number += 1

    def _seed(self, cell: Cell, turn: int, part: int) -> int:
        key = f"{self.seed}/{self.what}/{self.definition.name}/{cell.number}/{turn}/{part}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") >> 1

    def identity(self) -> dict[str, Any]:
        """The plan as JSON; the definition as its digest."""
        fields = {name: value for name, value in asdict(self).items() if name != "definition"}
        fields["trait"] = self.definition.name
        content = self.definition.model_dump_json().encode()
        fields["definition"] = hashlib.sha256(content).hexdigest()
        plain: dict[str, Any] = json.loads(json.dumps(fields))
        return plain


def _share(size: int, count: int, rank: int) -> int:
    return size // count + (rank < size % count)
