"""A whole evaluation of one artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from npti_export.bench import Question, TraitBench, load_bench
from npti_export.errors import EvaluationError, NptiError, ProfileError
from npti_export.evaluate import baselines
from npti_export.evaluate.assemble import Found, assemble
from npti_export.evaluate.capability.neutral import NeutralText
from npti_export.evaluate.capability.part import BaseSkill, base_skill, compare_tasks
from npti_export.evaluate.capability.tasks import neutral_passages, read_tasks, shipped_tasks
from npti_export.evaluate.conditions import Answered, Doubles, Kind, Test, Told, Way, ask, scored
from npti_export.evaluate.contrast import contrasts
from npti_export.evaluate.distribution import distribution, trait_neurons
from npti_export.evaluate.document import CapabilityPart, Distribution, Document, JudgePart
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.inventory.answers import InventoryAnswers, answer_inventory, inventory_part
from npti_export.evaluate.inventory.items import Item, read_inventory, source_name
from npti_export.evaluate.judge.spec import JudgeSpec
from npti_export.evaluate.prompts import Prompting
from npti_export.evaluate.subject import Subject, SubjectJob, opened, unsteered
from npti_export.identify.profiles import identified
from npti_export.loader import Timings
from npti_export.profile import NeuronProfile
from npti_export.progress import Progress
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule
from npti_export.runtimes.base import Runtime
from npti_export.traits import FACETS

if TYPE_CHECKING:
    from npti_export.runtimes.transformers import TransformersRuntime

QUESTIONS = 48  # unless another number is asked for; 32 take 316 to 402 s on the default model (benchmarks/poles.py)
PASSAGES = 16  # neutral ones at which baselines are brought to the artifact's damage
KEPT_BYTES = 4 << 30  # of what the base predicts, where it cannot be asked again while it is steered
BASELINE_QUESTIONS = 96  # that neurons are identified on for the other methods, if nobody did so before
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
    if job.judges:
        from npti_export.evaluate.judge.run import check_judges

        check_judges(job.judges, job.journal, progress.note)
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
        work = _Work(job, subject, test, timings, progress)
        with timings.measure("capability"):
            kept = {"kept_bytes": KEPT_BYTES} if subject.shares else {}
            skill = base_skill(subject.base, tasks, neutral_passages(), **kept)
            if subject.shares:
                skill.neutral.keep()
            before = answer_inventory(subject.base, items) if items else None
        told, capability, after = work.own(skill, items)
        inventory = None
        if before is not None and after is not None:
            inventory = inventory_part(before, after, items, source_name(job.inventory), seed=job.seed)
        with timings.measure("baselines"):
            told += work.others()
        with timings.measure("score"):
            progress.start("score", len(test.questions))
            answered = scored(told, subject.scorer, test, progress)
        cross_talk: dict[str, Doubles] = {}
        if "cross-talk" not in job.skips:
            with timings.measure("cross-talk"):
                cross_talk = work.cross_talk(answered[0], answered[1])
        judged = work.judge(answered)
        timings.seconds["total"] = time.perf_counter() - started
        found = Found(answered, capability, inventory, judged, cross_talk, work.strengths, work.distribution)
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
    timings: Timings
    progress: Progress
    strengths: dict[str, dict[str, float]] = field(default_factory=dict)
    distribution: Distribution | None = None
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
        order = [told[0], told[len(before)], *told[1 : len(before)], *told[len(before) + 1 :]]
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

    def others(self) -> list[Told]:
        """Other methods on the same questions, at the artifact's damage; fine-tuning as it comes out."""
        found = self._ruled([name for name in self.job.baselines if name != baselines.LORA])
        return [*found, self._fine_tuned()] if baselines.LORA in self.job.baselines else found

    def _ruled(self, names: Sequence[str]) -> list[Told]:
        engine, saved = self.subject.engine, self.subject.saved
        if not names:
            return []
        if engine is None:
            self.progress.note(f"{self.subject.source.name}: no rule can be baked into it, so there are no baselines")
            return []
        neutral = NeutralText(engine.base, neutral_passages()[:PASSAGES], kept_bytes=KEPT_BYTES)
        neutral.keep()
        methods = [name for name in names if name in baselines.METHODS]
        profile = self._profile() if methods else None
        rules: dict[str, tuple[str, SteeringRule]] = {}
        for name in methods:
            assert profile is not None
            try:
                rules[name] = baselines.method_rule(name, profile, self.subject.spec)
            except ProfileError as error:  # it selects no neuron of this model
                self.strengths[name] = {"neurons": 0}
                self.progress.note(f"baseline {name} is left out: {error}")
        if baselines.NULL in names and saved is not None:
            rules[baselines.NULL] = ("Random neurons", baselines.null_rule(saved.rule, self.job.seed))
        elif baselines.NULL in names:
            self.progress.note(f"{self.subject.artifact.name}: holds no rule, so random neurons have nothing to match")
        self.progress.start("baselines", len(rules))
        return [self._baseline(name, label, rule, neutral) for name, (label, rule) in rules.items() if self._advance()]

    def _baseline(self, name: str, label: str, rule: SteeringRule, neutral: NeutralText) -> Told:
        engine = self.subject.engine
        assert engine is not None
        level = baselines.level(engine, lambda at: baselines.scaled(rule, at), neutral, max(self.damage, 1e-6))
        self.strengths[name] = {"strength": round(level.strength, 4), "damage": round(level.damage, 5)}
        kind: Kind = "null" if name == baselines.NULL else "baseline"
        way = Way(name, label, kind, lambda: engine.steered(level.rule))
        with way.open() as runtime:
            return ask(way, runtime, self.test)

    def _fine_tuned(self) -> Told:
        """The paper's fine-tuning row. It has no strength, so its damage is what it is, and is told beside it."""
        from npti_export.evaluate.finetune import FineTuneSettings, fine_tuned, plain_exchanges

        subject, test, models = self.subject, self.test, self.subject.models
        trains = models.engine == "transformers" and models.dtype() != "float16"  # which overflows
        runtime = cast("TransformersRuntime", models.fast()) if trains else models.exact()
        count = min(FineTuneSettings.questions, len(subject.bench.split("search")))
        settings = FineTuneSettings(questions=count, seed=self.job.seed)
        exchanges = plain_exchanges(
            runtime, subject.bench, test.sign, test.recipe, count, max_new_tokens=test.answer_tokens
        )
        neutral = NeutralText(runtime, neutral_passages()[:PASSAGES], kept_bytes=KEPT_BYTES)
        neutral.keep()
        way = Way(
            baselines.LORA,
            "Fine-tuned (LoRA), not at equal damage",
            "baseline",
            lambda: fine_tuned(runtime, exchanges, settings, self.progress),
        )
        with way.open() as tuned:
            told = ask(way, tuned, test)
            damage = float(neutral.kl(tuned).mean())
        self.strengths[way.name] = {"damage": round(damage, 5), "questions": count, "epochs": settings.epochs}
        return told

    def _profile(self) -> NeuronProfile:
        """Neurons of the trait, for the other methods, and what they do under both poles."""
        subject = self.subject
        available = len(subject.bench.split("search"))
        recipe = load_recipe(
            "npti",
            [
                f"identify.questions={min(BASELINE_QUESTIONS, available)}",
                f"identify.max_new_tokens={self.job.answer_tokens}",
                f"identify.batch_size={subject.recipe.identify.batch_size}",
            ],
        )
        stats, profile = identified(subject.place, subject.bench, recipe, self.progress)
        sign = subject.spec.sign
        with suppress(ProfileError):  # none selected: a baseline says so
            neurons = trait_neurons(None if subject.saved is None else subject.saved.rule, profile, sign, recipe)
            self.distribution = distribution(stats, neurons, sign)
        return profile

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
                journal=self.job.journal,
                note=self.progress.note,
            )
        return None


@contextmanager
def _noted(progress: Progress, what: str) -> Iterator[None]:
    try:
        yield
    except NptiError as error:
        progress.note(f"{what}: {error}")
