"""Answering questions without chance: by the likelihood of each option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.evaluate.capability.model import Model
from npti_export.evaluate.capability.tasks import TaskSet
from npti_export.runtimes.base import Exchange, Message


@dataclass(frozen=True)
class Answers:
    """What a model made of a set of questions.

    Attributes:
        likelihoods: per question ``[options]``, mean log-likelihood per token of each option as the answer.
        right: ``[questions]`` index of the right option.
    """

    likelihoods: list[npt.NDArray[np.float64]]
    right: npt.NDArray[np.int64]

    @property
    def correct(self) -> npt.NDArray[np.float64]:
        """``[questions]`` 1 where the right option is the likeliest; ties go to the first option."""
        chosen = [int(one.argmax()) for one in self.likelihoods]
        return np.equal(chosen, self.right).astype(np.float64)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return float(np.mean([1 / len(one) for one in self.likelihoods]))


def prompts_of(model: Model, task: TaskSet) -> list[tuple[int, ...]]:
    """Each question of a set as a user's turn, behind the set's examples as earlier turns."""
    shown: list[Message] = []
    for example in task.examples:
        shown += [{"role": "user", "content": example.text}, {"role": "assistant", "content": example.answer}]
    return [model.encode([*shown, {"role": "user", "content": question.text}]) for question in task.questions]


def answer_tasks(model: Model, tasks: Sequence[TaskSet]) -> list[Answers]:
    """Score every option of every question, all sets in one go.

    An option's score is its mean log-likelihood *per token*: the sum would prefer short options whatever they say,
    since every token more costs likelihood. The options are not shown in the question, so that what is measured is
    what the model would say, not whether it follows letters, which small models do not.

    Returns:
        One for each set, in their order.
    """
    exchanges = [
        Exchange(prompt, model.encode_text(option, begin=False))
        for task in tasks
        for question, prompt in zip(task.questions, prompts_of(model, task), strict=True)
        for option in question.options
    ]
    scores = iter(model.log_likelihoods(exchanges))
    return [
        Answers(
            [np.array([next(scores) for _ in question.options]) for question in task.questions],
            np.array([question.right for question in task.questions]),
        )
        for task in tasks
    ]
