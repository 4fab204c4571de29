"""Answers of every way to get a personality, on the same questions, scored by the same unsteered model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from npti_export.bench import Question, TraitBench
from npti_export.evaluate.contrast import ContrastScores, Tokens, score
from npti_export.evaluate.document import Condition, Estimate
from npti_export.evaluate.estimate import estimate, transformed
from npti_export.evaluate.fluency import Reading, reading
from npti_export.evaluate.prompts import Prompting, prompts
from npti_export.identify.collect import answer
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Runtime
from npti_export.traits import Sign

Kind = Literal["base", "steered", "prompt", "baseline", "null"]
Doubles = npt.NDArray[np.float64]
LARGEST_LOG = 700.0  # whose exponential is still a number


@dataclass(frozen=True)
class Test:
    """What is asked, and how it is scored.

    Attributes:
        bench: of the trait.
        sign: the wanted pole.
        questions: asked of every condition.
        recipe: how prompts are put and answers decoded.
        answer_tokens: longest answer.
        personas: pairs of personas that score each answer.
        seed: of the intervals.
    """

    __test__ = False  # no test of pytest's

    bench: TraitBench
    sign: Sign
    questions: Sequence[Question]
    recipe: Recipe
    answer_tokens: int
    personas: int
    seed: int = 0


@dataclass(frozen=True)
class Way:
    """One way to get a personality.

    Attributes:
        name: key in the document.
        label: what a reader sees.
        kind: of it.
        open: the model that answers, for as long as the block lasts.
        how: it is prompted.
        against: the way that it gains over: the same weights in the same runtime, unsteered.
    """

    name: str
    label: str
    kind: Kind
    open: Callable[[], AbstractContextManager[Runtime]]
    how: Prompting = "plain"
    against: str = "unsteered"


@dataclass(frozen=True)
class Told:
    """What a model answered.

    Attributes:
        way: which.
        tokens: the answers.
        seconds: that they took.
        damage: KL to the unsteered model on neutral text, in nats a token; None where it was not measured.
        groups: of which random draw each answer is; None where there is nothing random.
    """

    way: Way
    tokens: list[Tokens]
    seconds: float
    damage: float | None = None
    groups: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Answered:
    """What came of one way.

    Attributes:
        way: which.
        tokens: the answers.
        texts: likewise.
        scores: of each answer.
        readings: likewise.
        seconds: that it took; of scoring, its share.
        damage: as in :class:`Told`, like ``groups``.
    """

    way: Way
    tokens: list[Tokens]
    texts: list[str]
    scores: ContrastScores
    readings: list[Reading]
    seconds: float
    damage: float | None = None
    groups: tuple[int, ...] | None = None

    def towards(self, sign: Sign) -> Doubles:
        """Contrasts towards a pole, ``[questions]``."""
        return self.scores.towards(sign)


def ask(way: Way, runtime: Runtime, test: Test) -> Told:
    """Let an opened model answer."""
    started = time.perf_counter()
    asked = prompts(runtime, test.bench, test.questions, test.sign, test.recipe, way.how)
    return Told(way, answer(runtime, asked, test.recipe, test.answer_tokens), time.perf_counter() - started)


def scored(told: Sequence[Told], scorer: Runtime, test: Test, progress: Progress | None = None) -> list[Answered]:
    """Score answers by the unsteered model, all together, which saves much of the work."""
    started = time.perf_counter()
    several = [one.tokens for one in told]
    found = score(scorer, test.bench, test.questions, several, test.recipe, personas=test.personas, progress=progress)
    seconds = (time.perf_counter() - started) / max(len(told), 1)
    return [_answered(one, scores, seconds, scorer, test) for one, scores in zip(told, found, strict=True)]


def _answered(told: Told, scores: ContrastScores, seconds: float, scorer: Runtime, test: Test) -> Answered:
    texts = [scorer.decode(one) for one in told.tokens]
    # the token that ends an answer is no part of what is read
    lengths = [len(one) - (len(one) < test.answer_tokens) for one in told.tokens]
    readings = [reading(text, length) for text, length in zip(texts, lengths, strict=True)]
    return Answered(told.way, told.tokens, texts, scores, readings, told.seconds + seconds, told.damage, told.groups)


def condition(found: Answered, base: Answered, test: Test) -> Condition:
    """The figures of one way, with their intervals, beside those of the model that it gains over."""
    contrast = found.towards(test.sign)

    def mean(values: npt.ArrayLike) -> Estimate:
        return estimate(values, seed=test.seed, groups=found.groups)

    fluency = mean(found.scores.fluency)
    return Condition(
        name=found.way.name,
        label=found.way.label,
        kind=found.way.kind,
        contrast=mean(contrast),
        gain=None if found.way.kind == "base" else mean(contrast - base.towards(test.sign)),
        damage=found.damage,
        fluency=fluency,
        perplexity=perplexity(fluency),
        repetition=mean([one.repetition for one in found.readings]),
        distinct=mean([one.distinct for one in found.readings]),
        length=mean([one.length for one in found.readings]),
        seconds=round(found.seconds, 2),
    )


def perplexity(fluency: Estimate) -> Estimate:
    """exp(-x) of a mean log-likelihood per token."""
    return transformed(fluency, lambda value: math.exp(min(-value, LARGEST_LOG)))
