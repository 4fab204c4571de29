"""A score of trait expression that needs no judge.

An answer's contrast is its mean log-likelihood per token under personas of the wanted pole minus that under
personas of the opposite pole, both computed by the *unsteered* model. Its fluency is the log-likelihood per token
of the answer after the plain question, again by the unsteered model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.bench import Question, TraitBench
from npti_export.evaluate.prompts import scoring_prompts
from npti_export.identify.collect import plain_prompts
from npti_export.progress import Progress, Silent
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Exchange, Runtime
from npti_export.traits import SIGNS, Sign

Doubles = npt.NDArray[np.float64]
Tokens = tuple[int, ...]
_TOGETHER = 16  # questions that are scored at once: enough to share what personas add to a prompt


@dataclass(frozen=True)
class ContrastScores:
    """Scores of a list of answers, ``[questions]`` each, in nats per token.

    ``contrast`` is towards the ``+`` pole; negate it for the ``-`` pole.
    """

    contrast: Doubles
    fluency: Doubles

    def towards(self, sign: Sign) -> Doubles:
        """The contrast towards one pole."""
        return self.contrast if sign == "+" else -self.contrast


def contrasts(
    scorer: Runtime,
    bench: TraitBench,
    questions: Sequence[Question],
    several: Sequence[Sequence[Tokens]],
    recipe: Recipe,
    *,
    personas: int,
) -> list[Doubles]:
    """Contrasts towards ``+`` of answers of several models to the same questions, see :func:`score`."""
    asked = _scoring(scorer, bench, questions, recipe, personas)
    found = _likelihoods(scorer, asked, several, Silent())
    return [_contrast(one) for one in found]


def score(
    scorer: Runtime,
    bench: TraitBench,
    questions: Sequence[Question],
    several: Sequence[Sequence[Tokens]],
    recipe: Recipe,
    *,
    personas: int,
    progress: Progress | None = None,
) -> list[ContrastScores]:
    """Score answers of several models with the unsteered model; together, so that their prompts are read once.

    Args:
        scorer: the unsteered model.
        bench: personas of both poles.
        questions: what was asked.
        several: for each model its answers, one a question.
        recipe: its prompt section and seed.
        personas: how many pairs of personas score each answer.
        progress: told of each question.
    """
    asked = [*_scoring(scorer, bench, questions, recipe, personas), plain_prompts(scorer, questions, recipe)]
    found = _likelihoods(scorer, asked, several, progress or Silent())
    return [ContrastScores(_contrast(one[:-1]), one[-1]) for one in found]


def _scoring(
    scorer: Runtime, bench: TraitBench, questions: Sequence[Question], recipe: Recipe, personas: int
) -> list[list[Tokens]]:
    """Prompts under both poles of each pair of personas, turn by turn."""
    return [scoring_prompts(scorer, bench, questions, sign, recipe, turn) for turn in range(personas) for sign in SIGNS]


def _likelihoods(
    scorer: Runtime, asked: Sequence[Sequence[Tokens]], several: Sequence[Sequence[Tokens]], progress: Progress
) -> list[Doubles]:
    """For each model, ``[ways of asking, questions]``: how likely its answers are after each prompt."""
    found = []
    for start in range(0, len(asked[0]), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        prompts, answers = [one[some] for one in asked], [one[some] for one in several]
        exchanges = [Exchange(*pair) for told in answers for way in prompts for pair in zip(way, told, strict=True)]
        values = np.array(scorer.log_likelihoods(exchanges), np.float64)
        found.append(values.reshape(len(several), len(asked), -1))
        progress.advance(len(prompts[0]))
    return list(np.concatenate(found, -1))


def _contrast(found: Doubles) -> Doubles:
    """``[questions]`` of ``[2 a pair of personas, questions]``."""
    contrast: Doubles = (found[0::2] - found[1::2]).mean(0)
    return contrast
