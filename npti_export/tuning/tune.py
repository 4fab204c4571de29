"""A whole tuning of one pole: search, pick, confirm, once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from npti_export.errors import BenchError, EvaluationError
from npti_export.evaluate.conditions import Answered, Test, Way, condition
from npti_export.evaluate.document import ParetoPoint
from npti_export.evaluate.engine import Engine
from npti_export.evaluate.estimate import estimate
from npti_export.evaluate.subject import unsteered
from npti_export.evaluate.supplements import Confirmation, TrialRecord, TuningRecord
from npti_export.files import translate_os_errors
from npti_export.identify.collect import cache_key
from npti_export.profile import NeuronProfile
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule import SteeringRule, build_rule
from npti_export.tuning.budget import Budget, largest_gain, pareto_front
from npti_export.tuning.opening import METHODS, Method, ModelJob, Opened, opened, plain_pole
from npti_export.tuning.search import Finished, Limits, Study, opened_study
from npti_export.tuning.space import Point, Space, with_section
from npti_export.tuning.trial import PASSAGES, Figures, Measure, other_passages, search_questions, trial_passages

_FORMAT = 1  # raise when figures of earlier trials are no longer comparable
_CONFIRMED = 3  # ways that are confirmed: unsteered, prompted, steered


@dataclass(frozen=True)
class TuneJob:
    """What a user asked for.

    Attributes:
        subject: model and pole.
        minutes: until all is done; one trial is made in any case.
        trials: most that have figures, earlier ones of the same study included; None for what there is time for.
        questions: search questions that trials are judged on.
        test_questions: that confirm the pick, 0 for all.
        confirm: whether they do: not where a whole evaluation of the pick follows.
        answer_tokens: longest answer.
        personas: pairs that score an answer.
        budget: what steering may cost.
        methods: what rules may be made of: shifts and clamps of ``neurons``, the poles' ``mean`` difference, the
            ``matched`` constant.
        storage: SQLite file to go on from; None takes one in the cache, or keeps nothing without one.
        seed: of the sampler and of intervals.
    """

    subject: ModelJob
    minutes: float = 30.0
    trials: int | None = None
    questions: int = 32
    test_questions: int = 0
    confirm: bool = True
    answer_tokens: int = 64
    personas: int = 2
    budget: Budget = field(default_factory=Budget)
    methods: tuple[Method, ...] = METHODS
    storage: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        record: everything.
        recipe: that was started from.
        point: that was picked; None where no trial within the budget moves the answers towards the pole.
        space: that it is of.
    """

    record: TuningRecord
    recipe: Recipe
    point: Point | None
    space: Space


def tune(job: TuneJob, progress: Progress, clock: Callable[[], float] = time.monotonic) -> Tuned:
    """Search, pick within the budget, and confirm the pick on test questions, which are asked of nothing else.

    Raises:
        NptiError: something is wrong with the job, or no trial gave a rule.
    """
    started = clock()
    if not job.methods or set(job.methods) - set(METHODS):
        raise EvaluationError(f"--methods {','.join(job.methods)}: give one or more of {', '.join(METHODS)}")
    if not 0 < job.minutes < float("inf"):
        raise EvaluationError(f"--minutes {job.minutes}: give a number above 0")
    with opened(replace(job.subject, trait=plain_pole(job.subject.trait)), progress) as at:
        questions = search_questions(at.bench, at.recipe, job.questions)
        held_out = _held_out(job, at)
        methods = at.methods(job.methods)
        profile = at.whole_profile(methods)
        engine = at.engine()
        test = Test(at.bench, at.spec.sign, questions, at.recipe, job.answer_tokens, job.personas, job.seed)
        measure = Measure(engine, test, trial_passages())
        tuner = _Tuner(job, at, engine, profile, measure, _space(at, profile, methods))
        after = _CONFIRMED * held_out / len(questions) if job.confirm else 0.0
        limits = Limits(job.trials, 60 * job.minutes - (clock() - started), after, clock)
        name = f"{at.spec.pole} {tuner.key}"
        with opened_study(_storage(job, at, tuner.key), name, tuner.space, tuner.excess, seed=job.seed) as study:
            study.run(tuner.trial, tuner.space.starts(at.recipe.for_pole(at.spec.pole)), limits, progress)
            return tuner.picked(study, progress)


def _held_out(job: TuneJob, at: Opened) -> int:
    """How many test questions the pick will be confirmed on."""
    there = len(at.bench.split("test"))
    if job.test_questions > there:
        raise BenchError(f"{at.bench.trait}: {job.test_questions} test questions asked for, the bench has {there}")
    return job.test_questions or there


def _storage(job: TuneJob, at: Opened, key: str) -> Path | None:
    if job.storage is not None or at.job.cache is None:
        return job.storage
    folder = at.job.cache / "tune"
    with translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{at.spec.pole}-{key}.sqlite"


def _space(at: Opened, profile: NeuronProfile, methods: Sequence[Method]) -> Space:
    shape = at.source.shape
    return Space(
        shape.layers,
        shape.layers * shape.width,
        constants="mean" in methods and profile.mean_plus is not None,
        matched="matched" in methods and profile.matched(at.spec.sign) is not None,
        selects="neurons" in methods,
    )


@dataclass(frozen=True)
class _Tuner:
    job: TuneJob
    at: Opened
    engine: Engine
    profile: NeuronProfile
    measure: Measure
    space: Space

    @property
    def key(self) -> str:
        """A short name of all that a trial's figures depend on beside its point."""
        job, at = self.job, self.at
        settings = at.recipe.for_pole(at.spec.pole)
        depends = [
            _FORMAT,
            cache_key(at.source, at.bench, at.recipe, at.place.dtype, at.place.device),
            at.spec.pole,
            [settings.rule.percentile, settings.rule.slope, settings.rule.center],
            self.profile.origin.get("questions"),
            at.recipe.identify.matched_questions,
            [self.space.layers, self.space.neurons, self.space.constants, self.space.matched, self.space.selects],
            [job.questions, job.answer_tokens, job.personas, PASSAGES],
        ]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]

    def rule(self, point: Point) -> SteeringRule:
        """The rule that the delivered recipe gives."""
        recipe = with_section(self.at.recipe, self.at.spec.pole, self.space.section(point))
        return build_rule(self.profile, self.at.spec, recipe)

    def trial(self, point: Point) -> Figures:
        """One trial."""
        return self.measure.rule(self.rule(point))

    def excess(self, figures: Figures) -> tuple[float, float]:
        """How far a trial exceeds each limit of the budget."""
        assert figures.damage is not None
        return self.job.budget.excess(figures.damage.mean, figures.fluency.mean, self.measure.fluency)

    def picked(self, study: Study, progress: Progress) -> Tuned:
        """The pick of all trials, and its confirmation."""
        found = study.finished()
        trials = [self._record(one) for one in found]
        gains, damages = [one.gain.mean for one in trials], [one.damage.mean for one in trials]
        chosen = largest_gain(gains, damages, [one.within and one.gain.mean > 0 for one in trials])
        front = pareto_front(gains, damages)
        pareto = [
            ParetoPoint(
                label=one.label,
                gain=one.gain.mean,
                damage=one.damage.mean,
                fluency=one.fluency.mean,
                on_front=front[place],
                chosen=place == chosen,
            )
            for place, one in enumerate(trials)
        ]
        confirmation = None
        if chosen is not None and self.job.confirm:
            confirmation = self._confirm(self.rule(found[chosen].point), study, progress)
        at, job = self.at, self.job
        record = TuningRecord(
            model={"name": at.source.name, "fingerprint": at.source.fingerprint},
            pole=at.spec.pole,
            recipe=at.recipe.name,
            settings={
                "questions": job.questions,
                "answer_tokens": job.answer_tokens,
                "personas": job.personas,
                "passages": PASSAGES,
                "seed": job.seed,
                "minutes": job.minutes,
                "bench": at.bench.digest,
                "study": self.key,
            },
            base_fluency=self.measure.fluency,
            budget={"max_kl": job.budget.max_kl, "max_fluency_loss": job.budget.max_fluency_loss},
            trials=trials,
            failed=study.failed,
            pareto=pareto,
            confirmation=confirmation,
        )
        return Tuned(record, at.recipe, None if chosen is None else found[chosen].point, self.space)

    def _record(self, one: Finished) -> TrialRecord:
        section, figures = self.space.section(one.point), one.figures
        assert figures.damage is not None
        return TrialRecord(
            number=one.number,
            label=self.space.label(one.point),
            select=section.select,
            rule=section.rule,
            gain=figures.gain,
            damage=figures.damage,
            fluency=figures.fluency,
            within=max(self.excess(figures)) <= 0,
        )

    def _confirm(self, rule: SteeringRule, study: Study, progress: Progress) -> Confirmation:
        """The pick beside the unsteered model and the persona prompt, on what nothing was chosen by."""
        before = study.confirmed
        if before:
            progress.note(
                f"test questions were asked of {before} earlier pick(s) of this study; do not choose between its picks "
                "by them"
            )
        study.confirm()
        bench, job = self.at.bench, self.job
        test = replace(self.measure.test, questions=bench.test(job.test_questions))
        progress.start("confirm", _CONFIRMED)
        measure = Measure(self.engine, test, other_passages())
        progress.advance(1)
        steered, damage = measure.steered(rule)
        progress.advance(1)
        prompt = Way("prompt-persona", "Persona prompt", "prompt", lambda: unsteered(self.engine.base), "persona")
        told: list[Answered] = [measure.base, steered, measure.answered(prompt)]
        progress.advance(1)
        return Confirmation(
            questions=len(test.questions),
            conditions=[condition(one, measure.base, test) for one in told],
            kl_neutral=estimate(damage, seed=job.seed),
            within=job.budget.holds(float(damage.mean()), float(steered.scores.fluency.mean()), measure.fluency),
            before=before,
        )
