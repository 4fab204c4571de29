"""One trial's figures: how far the answers move, how they read, and what happens to neutral text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from npti_export.bench import Question, TraitBench
from npti_export.errors import BenchError, EvaluationError
from npti_export.evaluate.capability.neutral import KEPT_BYTES, NeutralText
from npti_export.evaluate.capability.tasks import Passage, neutral_passages
from npti_export.evaluate.conditions import Answered, Doubles, Test, Way, ask, scored
from npti_export.evaluate.document import Estimate
from npti_export.evaluate.engine import Engine, TorchEngine
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.prompts import Prompting
from npti_export.evaluate.subject import unsteered
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.base import Runtime

PASSAGES = 8  # that trials are measured on; the others confirm what was picked
_SHARED_BYTES = 4 << 30  # of what the base predicts, where it may not be asked again while it is steered


@dataclass(frozen=True)
class Figures:
    """What a trial is judged by.

    Attributes:
        gain: of the contrast over the unsteered answers, question by question.
        fluency: log-likelihood per token under the plain question, by the unsteered model.
        damage: KL(unsteered ‖ steered) in nats a token, by passage; None where it was not measured.
    """

    gain: Estimate
    fluency: Estimate
    damage: Estimate | None


def search_questions(bench: TraitBench, recipe: Recipe, count: int) -> tuple[Question, ...]:
    """Search questions to tune on: the last of the seeded order whose first ones ``rule.matched`` is found on.

    Identification begins at the other end, too, and stops before these where it settles early.

    Raises:
        BenchError: there are too few.
    """
    order, used = bench.search(0, recipe.identify.seed), recipe.identify.matched_questions
    if count < 1 or count > len(order) - used:
        raise BenchError(
            f"{bench.trait}: {count} search questions asked for; the bench has {len(order)}, of which "
            f"identify.matched_questions takes {used}"
        )
    return order[len(order) - count :]


def trial_passages() -> tuple[Passage, ...]:
    """Neutral texts that trials are measured on."""
    return neutral_passages()[:PASSAGES]


def other_passages() -> tuple[Passage, ...]:
    """The neutral texts that no trial saw."""
    return neutral_passages()[PASSAGES:]


class Measure:
    """Measures rules on the same questions and texts.

    Args:
        engine: runs them.
        test: what is asked, and how it is scored.
        passages: neutral texts.

    Attributes:
        base: the unsteered answers.
    """

    def __init__(self, engine: Engine, test: Test, passages: Sequence[Passage]) -> None:
        self._engine, self.test = engine, test
        shared = isinstance(engine, TorchEngine)
        self._neutral = NeutralText(engine.base, passages, kept_bytes=_SHARED_BYTES if shared else KEPT_BYTES)
        if shared:
            self._neutral.keep()
        way = Way("unsteered", "Unsteered", "base", lambda: unsteered(engine.base))
        self.base = self.answered(way)

    @property
    def fluency(self) -> float:
        """Of the unsteered answers."""
        return float(self.base.scores.fluency.mean())

    def answered(self, way: Way) -> Answered:
        """The answers of any way, scored."""
        with way.open() as runtime:
            told = ask(way, runtime, self.test)
        return scored([told], self._engine.base, self.test)[0]

    def steered(self, rule: SteeringRule) -> tuple[Answered, Doubles]:
        """Scored answers under a rule, and its KL by passage."""
        way = Way("steered", "Steered", "steered", lambda: self._engine.steered(rule))
        with way.open() as runtime:
            told = ask(way, runtime, self.test)
            damage = self._neutral.kl(runtime)
        return scored([told], self._engine.base, self.test)[0], damage

    def rule(self, rule: SteeringRule) -> Figures:
        """The figures of a rule.

        Raises:
            EvaluationError: they are not numbers.
        """
        return self.figures(*self.steered(rule))

    def opened(self, steered: AbstractContextManager[Runtime]) -> Figures:
        """The figures of a model that is steered in another way, without those of neutral text."""
        return self.figures(self.answered(Way("steered", "Steered", "steered", lambda: steered)), None)

    def prompted(self, how: Prompting) -> Figures:
        """The figures of the unsteered model under a prompt, likewise without those of neutral text."""
        way = Way(f"prompt-{how}", f"{how.capitalize()} prompt", "prompt", lambda: unsteered(self._engine.base), how)
        return self.figures(self.answered(way), None)

    def figures(self, found: Answered, damage: Doubles | None) -> Figures:
        """Of answers beside the unsteered ones.

        Raises:
            EvaluationError: they are not numbers.
        """
        gain = found.towards(self.test.sign) - self.base.towards(self.test.sign)
        values = [gain, found.scores.fluency, *([] if damage is None else [damage])]
        if not all(np.isfinite(one).all() for one in values):
            raise EvaluationError("the steered model computes what are not numbers")
        estimates = [estimate(one, seed=self.test.seed) for one in values]
        return Figures(estimates[0], estimates[1], estimates[2] if damage is not None else None)
