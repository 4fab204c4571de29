"""Answering questions without chance: by the likelihood of each option, or greedily in so many words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.evaluate.capability.model import Model
from npti_export.evaluate.capability.tasks import Question, TaskSet
from npti_export.evaluate.fluency import words
from npti_export.runtimes.base import Exchange, Message

_GREEDY_TOKENS = 16  # the longest shipped option has seven
_PROMPTS_AT_ONCE = 16


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


def exact_matches(model: Model, task: TaskSet) -> npt.NDArray[np.float64]:
    """``[questions]`` 1 where a greedy answer of a few tokens says the right option and none of the others.

    Words are compared, so case and punctuation do not count. Right is an answer in which the right option's words
    come in a row, and those of no wrong option that is not part of the right one.
    """
    prompts = prompts_of(model, task)
    answers: list[Exchange] = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = prompts[start : start + _PROMPTS_AT_ONCE]
        answers += model.generate(some, max_new_tokens=_GREEDY_TOKENS, repetition_penalty=1.0)
    texts = [model.decode(answer.response) for answer in answers]
    return np.array([says(text, question) for text, question in zip(texts, task.questions, strict=True)], np.float64)


def says(text: str, question: Question) -> bool:
    """Whether an answer is right in the sense of :func:`exact_matches`."""
    said, right = words(text), words(question.answer)
    wrong = [words(option) for option in question.options if option != question.answer]
    return _holds(said, right) and not any(_holds(said, one) for one in wrong if not _holds(right, one))


def _holds(text: list[str], part: list[str]) -> bool:
    return any(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))
