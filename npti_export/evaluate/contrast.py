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
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Exchange, Runtime
from npti_export.traits import SIGNS, Sign

Doubles = npt.NDArray[np.float64]
Tokens = tuple[int, ...]


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
    answers: Sequence[Tokens],
    recipe: Recipe,
    *,
    personas: int,
) -> Doubles:
    """Contrast towards ``+`` of each answer, see :func:`score`."""
    exchanges = [
        Exchange(prompt, response)
        for turn in range(personas)
        for sign in SIGNS
        for prompt, response in zip(scoring_prompts(scorer, bench, questions, sign, recipe, turn), answers, strict=True)
    ]
    found = np.array(scorer.log_likelihoods(exchanges)).reshape(personas, len(SIGNS), len(questions))
    contrast: Doubles = (found[:, 0] - found[:, 1]).mean(0)
    return contrast


def score(
    scorer: Runtime,
    bench: TraitBench,
    questions: Sequence[Question],
    answers: Sequence[Tokens],
    recipe: Recipe,
    *,
    personas: int,
) -> ContrastScores:
    """Score answers with the unsteered model.

    Args:
        scorer: the unsteered model.
        bench: personas of both poles.
        questions: what was asked.
        answers: one a question.
        recipe: its prompt section and seed.
        personas: how many pairs of personas score each answer.
    """
    contrast = contrasts(scorer, bench, questions, answers, recipe, personas=personas)
    asked = plain_prompts(scorer, questions, recipe)
    fluency = scorer.log_likelihoods([Exchange(*pair) for pair in zip(asked, answers, strict=True)])
    return ContrastScores(contrast, np.array(fluency))
