"""The capability part of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npti_export.evaluate.capability.answers import Answers, answer_tasks
from npti_export.evaluate.capability.model import Model
from npti_export.evaluate.capability.neutral import KEPT_BYTES, NeutralText
from npti_export.evaluate.capability.tasks import Passage, TaskSet
from npti_export.evaluate.document import CapabilityPart, Change, Task
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.harness import Harness


@dataclass(frozen=True)
class BaseSkill:
    """What is known of the base, computed once for any number of steered models.

    Attributes:
        tasks: what it was asked.
        answers: what it answered, one a set.
        neutral: its predictions on neutral text.
        harness: what it made of tasks of lm-evaluation-harness; None where there are none.
    """

    tasks: tuple[TaskSet, ...]
    answers: tuple[Answers, ...]
    neutral: NeutralText
    harness: Harness | None = None


def base_skill(
    base: Model,
    tasks: Sequence[TaskSet],
    passages: Sequence[Passage],
    *,
    kept_bytes: int = KEPT_BYTES,
    harness: Sequence[str | dict[str, Any]] = (),
    limit: int | None = None,
) -> BaseSkill:
    """Let the unsteered model answer; ``base`` stays open for as long as the result is used.

    ``kept_bytes``: see :class:`npti_export.evaluate.capability.neutral.NeutralText`; ``harness`` and ``limit``: names
    and limit of :class:`npti_export.evaluate.harness.Harness`.
    """
    neutral = NeutralText(base, passages, kept_bytes=kept_bytes)
    published = Harness.of(base, harness, limit) if harness else None
    return BaseSkill(tuple(tasks), tuple(answer_tasks(base, tasks)), neutral, published)


def compare_skill(known: BaseSkill, steered: Model, *, seed: int = 0) -> CapabilityPart:
    """The steered model beside its base: differences are taken question by question.

    Raises:
        EvaluationError: a model of another vocabulary, or logits that are not numbers.
    """
    distances = estimate(known.neutral.kl(steered), seed=seed)
    return CapabilityPart(kl_neutral=distances, tasks=compare_tasks(known, steered, seed=seed))


def compare_tasks(known: BaseSkill, steered: Model, *, seed: int = 0) -> list[Task]:
    """The tests of skill of :func:`compare_skill`, those of lm-evaluation-harness last."""
    answers = answer_tasks(steered, known.tasks)
    published = [] if known.harness is None else known.harness.compared(steered, seed=seed)
    own = [
        Task(
            name=task.name,
            source=task.source,
            metric="accuracy",
            score=Change(
                base=estimate(before.correct, seed=seed),
                steered=estimate(after.correct, seed=seed),
                change=estimate(after.correct - before.correct, seed=seed),
            ),
        )
        for task, before, after in zip(known.tasks, known.answers, answers, strict=True)
    ]
    return own + published


def capability_part(
    base: Model, steered: Model, tasks: Sequence[TaskSet], passages: Sequence[Passage], *, seed: int = 0
) -> CapabilityPart:
    """What steering does to what the model knows and can; see :func:`base_skill` for several steered models."""
    return compare_skill(base_skill(base, tasks, passages), steered, seed=seed)
