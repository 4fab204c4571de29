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
from npti_export.identify.collect import contrast_prompts
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Exchange, chat
from npti_export.runtimes.transformers import TransformersRuntime


@dataclass(frozen=True)
class ContrastScores:
    """Scores of a list of answers, ``[questions]`` each, in nats per token.

    ``contrast`` is towards the ``+`` pole; negate it for the ``-`` pole.
    """

    contrast: npt.NDArray[np.float64]
    fluency: npt.NDArray[np.float64]


def plain_prompts(runtime: TransformersRuntime, questions: Sequence[Question], recipe: Recipe) -> list[tuple[int, ...]]:
    """The questions with no persona: what the user of a steered model sends."""
    return [
        runtime.encode(chat(None, recipe.prompt.user.replace("{question}", question.text))) for question in questions
    ]


def answer(
    runtime: TransformersRuntime, prompts: Sequence[tuple[int, ...]], recipe: Recipe, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Greedy answers in the recipe's batches, token ids."""
    answers: list[tuple[int, ...]] = []
    for start in range(0, len(prompts), recipe.identify.batch_size):
        exchanges = runtime.generate(
            prompts[start : start + recipe.identify.batch_size],
            max_new_tokens=max_new_tokens,
            repetition_penalty=recipe.identify.repetition_penalty,
        )
        answers += [exchange.response for exchange in exchanges]
    return answers


def score(
    runtime: TransformersRuntime,
    bench: TraitBench,
    questions: Sequence[Question],
    answers: Sequence[tuple[int, ...]],
    recipe: Recipe,
    *,
    personas: int,
) -> ContrastScores:
    """Score answers with the unsteered model.

    Args:
        runtime: the unsteered model.
        bench: personas of both poles.
        questions: what was asked.
        answers: one a question.
        recipe: its prompt section and seed.
        personas: how many persona pairs score each answer; the pairs differ from those that
            :func:`contrast_prompts` gives the same question at ``first=0``.
    """
    rounds = []
    for turn in range(1, personas + 1):
        likelihood = {
            sign: runtime.log_likelihoods(
                [
                    Exchange(prompt, response)
                    for prompt, response in zip(
                        contrast_prompts(runtime, bench, questions, sign, recipe, first=turn * 7),
                        answers,
                        strict=True,
                    )
                ]
            )
            for sign in ("+", "-")
        }
        rounds.append(np.subtract(likelihood["+"], likelihood["-"]))
    plain = [Exchange(p, a) for p, a in zip(plain_prompts(runtime, questions, recipe), answers, strict=True)]
    return ContrastScores(np.mean(rounds, axis=0), np.array(runtime.log_likelihoods(plain)))
