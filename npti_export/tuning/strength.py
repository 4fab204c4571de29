"""``--gamma auto``: the strength of a recipe's own rule that gains most within the budget, by a short search."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from npti_export.errors import EvaluationError, ProfileError
from npti_export.evaluate.conditions import Test
from npti_export.job import Job, prepared
from npti_export.profile import NeuronProfile
from npti_export.progress import Progress
from npti_export.publish import check_publication
from npti_export.rule import build_rule, compose
from npti_export.traits import FACETS, TraitSpec
from npti_export.tuning.budget import Budget, largest_gain
from npti_export.tuning.opening import ModelJob, Opened, opened
from npti_export.tuning.trial import Figures, Measure, search_questions, trial_passages

STRENGTHS = (1.0, 0.5, 1.5, 0.75, 2.0, 0.25, 1.25)  # in the order in which they are tried while there is time
SHARES = (1.0, 0.85, 0.7, 0.5)  # of their own strengths that several poles together are tried at
_PERSONAS = 2
_ADVICE = "look for other settings by npti-export tune, or give a number"


@dataclass(frozen=True)
class Auto:
    """How strengths are looked for.

    Attributes:
        budget: what steering may cost.
        minutes: for the poles, each by itself, identification aside; one strength of each is tried in any case.
        questions: search questions that they are judged on.
        answer_tokens: longest answer.
        clock: gives seconds.
    """

    budget: Budget = field(default_factory=Budget)
    minutes: float = 5.0
    questions: int = 32
    answer_tokens: int = 64
    clock: Callable[[], float] = time.monotonic


def with_strengths(job: Job, progress: Progress, how: Auto | None = None) -> Job:
    """The job with each pole at the strength that gains most within the budget, on search questions.

    A pole's own strength, as in ``calm:0.5``, is multiplied. Each of several poles is tuned alone; then all are
    measured together, and weakened alike where their sum does not keep the budget.

    Raises:
        EvaluationError: no strength of a pole keeps the budget, or none that does moves the answers towards it; or
            not even half of them all together keeps it.
        NptiError: something is wrong with the job; said before any work.
    """
    with prepared(job) as ready:
        check_publication(ready, strengths=False)
        profiles, chosen = ready.profiles, replace(job, recipe=job.recipe or ready.recipe.name)
    how = how or Auto()
    how = replace(how, minutes=how.minutes / len(job.traits))
    found = [_tuned(chosen, spec, profiles.get(spec.trait), how, progress) for spec in job.traits]
    share = _share(chosen, found, how, progress) if len(found) > 1 else 1.0
    return replace(job, traits=tuple(replace(one.spec, strength=one.spec.strength * share) for one in found))


@dataclass(frozen=True)
class _Tuned:
    spec: TraitSpec
    profile: NeuronProfile
    test: Test


def _subject(job: Job, spec: TraitSpec) -> ModelJob:
    bench = job.bench if spec.trait in FACETS else None
    return ModelJob(spec, job.model, job.recipe, job.overrides, bench, job.runtime, job.cache)


def _tuned(
    job: Job,
    spec: TraitSpec,
    profile: NeuronProfile | None,
    how: Auto,
    progress: Progress,
) -> _Tuned:
    with opened(_subject(job, spec), progress) as at:
        questions = search_questions(at.bench, at.recipe, how.questions)
        profile = profile or at.profile(at.recipe)
        test = Test(at.bench, spec.sign, questions, at.recipe, how.answer_tokens, _PERSONAS)
        measure = Measure(at.engine(), test, trial_passages())
        factor, figures = _best(at, profile, measure, how, progress)
    damage = figures.damage.mean if figures.damage else 0.0
    progress.note(
        f"gamma auto: {spec.pole} at {factor:g} times the recipe's strength: gain {figures.gain.mean:+.3f} on "
        f"{len(questions)} search questions, KL {damage:.3f}"
    )
    return _Tuned(replace(spec, strength=spec.strength * factor), profile, test)


def _share(job: Job, found: Sequence[_Tuned], how: Auto, progress: Progress) -> float:
    """The largest share of their strengths at which all poles together keep the budget.

    KL is that of the sum; fluency is a mean over the poles' questions.
    """
    budget, damages = how.budget, []
    with opened(_subject(job, found[0].spec), progress) as at:
        engine = at.engine()
        # text that has nothing to do with any trait is the same for all
        measures = [Measure(engine, one.test, trial_passages()[: None if one is found[0] else 0]) for one in found]
        unsteered = float(np.mean([one.fluency for one in measures]))
        progress.start("all together", len(SHARES))
        for share in SHARES:
            specs = [replace(one.spec, strength=one.spec.strength * share) for one in found]
            rule = compose([build_rule(one.profile, spec, at.recipe) for one, spec in zip(found, specs, strict=True)])
            figures = [one.rule(rule) for one in measures]
            progress.advance(1)
            damages.append(_damage(figures[0]))
            if budget.holds(damages[-1], float(np.mean([one.fluency.mean for one in figures])), unsteered):
                gains = ", ".join(f"{spec.pole} {one.gain.mean:+.3f}" for spec, one in zip(specs, figures, strict=True))
                progress.note(
                    f"gamma auto: all together at {share:g} of these strengths: {gains}, KL {damages[-1]:.3f}"
                )
                return share
    raise EvaluationError(
        f"--gamma auto: together the poles do not keep {budget}, not even at {min(SHARES):g} of their own strengths "
        f"(KL {min(damages):.3g}); name fewer, or give a number"
    )


def _best(
    at: Opened,
    profile: NeuronProfile,
    measure: Measure,
    how: Auto,
    progress: Progress,
) -> tuple[float, Figures]:
    budget, tried, clock = how.budget, list[tuple[float, Figures]](), how.clock
    progress.start(f"strength {at.spec.pole}", len(STRENGTHS))
    longest, last = 0.0, clock()
    until = last + 60 * how.minutes
    for factor in STRENGTHS:
        if tried and last + longest > until:
            break
        spec = replace(at.spec, strength=at.spec.strength * factor)
        tried.append((factor, measure.rule(build_rule(profile, spec, at.recipe))))
        now = clock()
        longest, last = max(longest, now - last), now
        progress.advance(1)
    gains, damages = [one.gain.mean for _, one in tried], [_damage(one) for _, one in tried]
    fluencies = [one.fluency.mean for _, one in tried]
    within = [budget.holds(*pair, measure.fluency) for pair in zip(damages, fluencies, strict=True)]
    place = largest_gain(gains, damages, within)
    if place is None:
        raise EvaluationError(
            f"--gamma auto: no strength of {at.spec.pole} from {min(f for f, _ in tried):g} to "
            f"{max(f for f, _ in tried):g} times the recipe's keeps {budget} (the smallest KL is {min(damages):.3g}); "
            f"{_ADVICE}"
        )
    if gains[place] <= 0:
        raise EvaluationError(
            f"--gamma auto: no strength within {budget} moves the answers towards {at.spec.pole}; the best, "
            f"{tried[place][0]:g} times the recipe's, gains {gains[place]:+.3f} at KL {damages[place]:.3f}; {_ADVICE}"
        )
    return tried[place]


def _damage(figures: Figures) -> float:
    if figures.damage is None:
        raise ProfileError("a strength was tried without neutral text")
    return figures.damage.mean
