"""The search questions of a trait in the batches that one process asks, and that are the shards of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from npti_export.bench import Question, TraitBench
from npti_export.recipe import Recipe


@dataclass(frozen=True)
class Batches:
    """A trait's questions, in order.

    Attributes:
        bench: personas and questions.
        recipe: by which neurons are identified: its ``prompt``, ``identify`` and ``select`` sections.
    """

    bench: TraitBench
    recipe: Recipe

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """All of them, in order."""
        return self.bench.search(self.recipe.identify.questions, self.recipe.identify.seed)

    @property
    def size(self) -> int:
        """How many questions are decoded together, each as both poles."""
        return max(1, self.recipe.identify.batch_size // 2)

    @property
    def batches(self) -> int:
        """How many there are."""
        return -(-len(self.questions) // self.size)

    def asked(self, batches: int) -> int:
        """Questions in so many first batches."""
        return min(batches * self.size, len(self.questions))

    def batch(self, index: int) -> Sequence[Question]:
        """The questions of one batch."""
        return self.questions[self.asked(index) : self.asked(index + 1)]
