"""A whole evaluation of one artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from npti_export.bench import Question, TraitBench, load_bench
from npti_export.errors import EvaluationError, NptiError
from npti_export.evaluate import baselines
from npti_export.evaluate.assemble import Found, assemble
from npti_export.evaluate.capability.part import BaseSkill, base_skill, compare_tasks
from npti_export.evaluate.capability.tasks import TaskSet, neutral_passages, read_tasks, shipped_tasks
from npti_export.evaluate.conditions import Answered, Doubles, Test, Told, Way, ask, scored
from npti_export.evaluate.contrast import contrasts
from npti_export.evaluate.document import CapabilityPart, Document, JudgePart
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.harness import HARNESS_LIMIT, check_harness
from npti_export.evaluate.inventory.answers import InventoryAnswers, answer_inventory, inventory_part
from npti_export.evaluate.inventory.items import Item, read_inventory, source_name
from npti_export.evaluate.judge.spec import JudgeSpec
from npti_export.evaluate.others import KEPT_BYTES, PASSAGES, Others
from npti_export.evaluate.prompts import Prompting
from npti_export.evaluate.subject import Subject, SubjectJob, opened, unsteered
from npti_export.loader import Timings
from npti_export.progress import Progress
from npti_export.runtimes.base import Runtime
from npti_export.traits import FACETS

if TYPE_CHECKING:
    from npti_export.evaluate.judge.verdicts import VerdictJournal

QUESTIONS = 32  # unless another number is asked for
BASELINES = (*baselines.METHODS, baselines.NULL)  # in every evaluation
KNOWN_BASELINES = (*BASELINES, baselines.LORA)
PROMPTED: dict[str, tuple[str, Prompting]] = {
    "prompt-adjective": ("Adjective prompt", "adjective"),
    "prompt-persona": ("Persona prompt", "persona"),
}
Own = tuple[list[Told], CapabilityPart, InventoryAnswers | None]


@dataclass(frozen=True)
class EvaluationJob:
    """What a user asked for.

    Attributes:
        subject: the artifact, and where it runs.
        questions: test questions, 0 for all; None for :data:`QUESTIONS`, or all where there are fewer.
        answer_tokens: longest answer.
        personas: pairs of personas that score each answer.
        baselines: names of :data:`KNOWN_BASELINES`.
        prompted: whether prompts are compared with, and added to the artifact.
        judges: that rate every condition's answers.
        journal: file that keeps their verdicts.
        inventory: a file of items, or None for the shipped ones.
        skips: parts that are left out: ``inventory``, ``capability``, ``cross-talk``.
        tasks: files of further tests of skill.
        harness: tasks of lm-evaluation-harness, or YAML files of such.
        harness_limit: most documents of each, 0 for all.
        seed: of intervals and of chance.
    """

    subject: SubjectJob
    questions: int | None = None
    answer_tokens: int = 64
    personas: int = 2
    baselines: tuple[str, ...] = BASELINES
    prompted: bool = True
    judges: tuple[JudgeSpec, ...] = ()
    journal: Path | None = None
    inventory: Path | None = None
    skips: frozenset[str] = frozenset()
    tasks: tuple[Path, ...] = ()
    harness: tuple[str, ...] = ()
    harness_limit: int = HARNESS_LIMIT
    seed: int = 0


def evaluate(job: EvaluationJob, progress: Progress) -> Document:
    """Evaluate an artifact.

    Test questions choose nothing here: not the artifact, which is given, nor the strength of a baseline, which is
    that at which it is as far from the unsteered model on neutral text as the artifact is.

    Raises:
        NptiError: something is wrong with the job, or a part of it cannot be done.
    """
    _check(job)
    items = read_inventory(job.inventory) if "inventory" not in job.skips else ()
    tasks = [*shipped_tasks(), *map(read_tasks, job.tasks)] if "capability" not in job.skips else []
    with ExitStack() as stack:
        journal = None
        if job.judges:
            from npti_export.evaluate.judge.run import check_judges, opened_journal

            # held from here on, so that a second run with it is refused before it has done any work
            journal = stack.enter_context(opened_journal(job.journal))
            check_judges(job.judges, journal, progress.note)
        return _evaluated(job, items, tasks, journal, progress)


def _evaluated(
    job: EvaluationJob,
    items: Sequence[Item],
    tasks: Sequence[TaskSet],
    journal: VerdictJournal | None,
    progress: Progress,
) -> Document:
    timings, started = Timings(), time.perf_counter()
    with opened(job.subject, timings, progress, job.questions or 0) as subject:
        _check_fine_tuning(job, subject)
        test = Test(
            subject.bench,
            subject.spec.sign,
            _questions(job, subject.bench),
            subject.recipe,
            job.answer_tokens,
            job.personas,
            job.seed,
        )
        work = _Work(job, subject, test, journal, timings, progress)
        with timings.measure("capability"):
            kept = {"kept_bytes": KEPT_BYTES} if subject.shares else {}
            limit = job.harness_limit or None
            skill = base_skill(subject.base, tasks, neutral_passages(), harness=job.harness, limit=limit, **kept)
            if subject.shares:
                skill.neutral.keep()
            before = answer_inventory(subject.base, items) if items else None
        told, capability, after = work.own(skill, items)
        inventory = None
        if before is not None and after is not None:
            inventory = inventory_part(before, after, items, source_name(job.inventory), seed=job.seed)
        others = Others(subject, test, job.baselines, work.damage, job.seed, progress)
        with timings.measure("baselines"):
            told += others.told()
        with timings.measure("score"):
            progress.start("score", len(test.questions))
            answered = scored(told, subject.scorer, test, progress)
        cross_talk: dict[str, Doubles] = {}
        if "cross-talk" not in job.skips:
            with timings.measure("cross-talk"):
                cross_talk = work.cross_talk(answered[0], answered[1])
        judged = work.judge(answered)
        timings.seconds["total"] = time.perf_counter() - started
        found = Found(answered, capability, inventory, judged, cross_talk, others.strengths, others.distribution)
        return assemble(found, subject, test, _settings(job, subject, test), timings)


def _check(job: EvaluationJob) -> None:
    unknown = sorted(set(job.baselines) - set(KNOWN_BASELINES))
    if unknown:
        raise EvaluationError(f"baseline {unknown[0]!r}: not known; there are {', '.join(KNOWN_BASELINES)}")
    if len(set(job.baselines)) < len(job.baselines):
        twice = next(name for name in job.baselines if job.baselines.count(name) > 1)
        raise EvaluationError(f"baseline {twice!r}: is given twice; give it once")
    if job.inventory is not None and "inventory" in job.skips:
        raise EvaluationError(f"--inventory {job.inventory}: is left out by --skip inventory; give one of the two")
    if job.tasks and "capability" in job.skips:
        raise EvaluationError(f"--tasks {job.tasks[0]}: is left out by --skip capability; give one of the two")
    trusted = job.subject.runtime.trust_remote_code
    check_harness(job.harness, skipped="capability" in job.skips, trusted=trusted)
    if job.journal is not None and not job.judges:
        raise EvaluationError("--judge-journal keeps verdicts, and there is no --judge; give one, or leave it out")
    if job.personas < 1 or job.answer_tokens < 2:
        raise EvaluationError("at least one pair of personas and two tokens of an answer are needed")


def _check_fine_tuning(job: EvaluationJob, subject: Subject) -> None:
    """Whether the model can be fine-tuned here, before an hour has gone into the rest."""
    if baselines.LORA not in job.baselines:
        return
    if subject.source.architecture.mixture:
        raise EvaluationError(
            f"baseline {baselines.LORA!r}: {subject.source.name} is a mixture of experts, which are no linear modules; "
            "leave it out"
        )
    subject.source.check_readable_by_transformers()


def _questions(job: EvaluationJob, bench: TraitBench) -> tuple[Question, ...]:
    count = min(QUESTIONS, len(bench.test())) if job.questions is None else job.questions
    return bench.test(count)


def _settings(job: EvaluationJob, subject: Subject, test: Test) -> dict[str, object]:
    return {
        "pole": subject.spec.pole,
        "questions": len(test.questions),
        "answer_tokens": job.answer_tokens,
        "personas": job.personas,
        "seed": job.seed,
        "engine": subject.models.engine,
        "scorer": subject.models.dtype(),
        "bench": subject.bench.digest,
        **({} if subject.read is None else {"where": "response", "capability_where": "all"}),
    }


@dataclass
class _Work:
    """The stages, which share what was opened."""

    job: EvaluationJob
    subject: Subject
    test: Test
    journal: VerdictJournal | None
    timings: Timings
    progress: Progress
    damage: float = 0.0

    def own(self, skill: BaseSkill, items: Sequence[Item]) -> Own:
        """The unsteered model and the artifact, plain and prompted, and what the artifact can still do."""
        subject = self.subject
        before = [Way("unsteered", "Unsteered", "base", lambda: unsteered(subject.base))]
        after = [Way("steered", "Steered", "steered", subject.steered)]
        for name, (label, how) in PROMPTED.items() if self.job.prompted else ():
            before.append(Way(name, label, "prompt", before[0].open, how))
            after.append(Way(f"steered-{name}", f"Steered and {label.lower()}", "prompt", subject.steered, how))
        self.progress.start("answer", len(before) + len(after))
        told = [ask(way, subject.base, self.test) for way in before if self._advance()]
        with subject.steered() as runtime:
            told += [ask(way, runtime, self.test) for way in after if self._advance()]
            if subject.read is None:
                capability, rated = self._cost(skill, items, runtime)
        if subject.read is not None:
            with subject.read() as runtime:
                capability, rated = self._cost(skill, items, runtime)
        steered = replace(told[len(before)], damage=self.damage)
        order = [told[0], steered, *told[1 : len(before)], *told[len(before) + 1 :]]
        return order, capability, rated

    def _cost(
        self, skill: BaseSkill, items: Sequence[Item], steered: Runtime
    ) -> tuple[CapabilityPart, InventoryAnswers | None]:
        """What the artifact can still do, and what it says of itself."""
        seed = self.job.seed
        with self.timings.measure("capability"):
            distances = skill.neutral.kl(steered)
            tasks = compare_tasks(skill, steered, seed=seed)
            rated = answer_inventory(steered, items) if items else None
        self.damage = float(distances[:PASSAGES].mean())
        return CapabilityPart(kl_neutral=estimate(distances, seed=seed), tasks=tasks), rated

    def _advance(self) -> bool:
        self.progress.advance(1)
        return True

    def cross_talk(self, base: Answered, steered: Answered) -> dict[str, Doubles]:
        """How far the same answers move towards the + pole of every one of the Big Five, ``[questions]`` each."""
        subject, test = self.subject, self.test
        found = {}
        for name in FACETS:
            if name == subject.spec.trait:
                found[name] = steered.scores.contrast - base.scores.contrast
                continue
            bench: TraitBench = load_bench(name)
            both = [one.tokens for one in (base, steered)]
            before, after = contrasts(subject.scorer, bench, test.questions, both, test.recipe, personas=1)
            found[name] = after - before
        return found

    def judge(self, answered: Sequence[Answered]) -> JudgePart | None:
        """What the judges say of every condition; nothing where all of them fail, which costs no other figure."""
        if not self.job.judges:
            return None
        from npti_export.evaluate.judge.run import judge_answers

        with self.timings.measure("judge"), _noted(self.progress, "no judge's scores"):
            return judge_answers(
                self.job.judges,
                self.subject.bench.definition,
                self.subject.spec.sign,
                [question.text for question in self.test.questions],
                {one.way.name: one.texts for one in answered},
                seed=self.job.seed,
                journal=self.journal,
                note=self.progress.note,
            )
        return None


@contextmanager
def _noted(progress: Progress, what: str) -> Iterator[None]:
    try:
        yield
    except NptiError as error:
        progress.note(f"{what}: {error}")
