"""Ablations: one setting of a recipe's rule varied at a time, on the same questions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from npti_export.errors import EvaluationError, ProfileError
from npti_export.evaluate.conditions import Test
from npti_export.evaluate.document import Sweep, SweepPoint
from npti_export.evaluate.engine import Engine, TorchEngine
from npti_export.evaluate.prompts import PROMPTINGS
from npti_export.evaluate.supplements import PROMPT, AblationRecord, steering
from npti_export.profile import NeuronProfile
from npti_export.progress import Progress
from npti_export.recipe import PoleSection, Recipe
from npti_export.rule import SteeringRule, build_rule
from npti_export.runtimes.base import Runtime
from npti_export.temporaries import TemporaryFolder
from npti_export.tuning.opening import ModelJob, Opened, opened
from npti_export.tuning.space import with_section
from npti_export.tuning.trial import PASSAGES, Figures, Measure, search_questions, trial_passages

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # times the recipe's gamma
THRESHOLDS = (0.05, 0.1, 0.15, 0.2)  # of |delta|, around the paper's 0.1
PARTS = ("shift", "clamp", "constant", "matched")
_OFF: dict[str, Any] = {"shift": False, "clamp": False, "constant": 0.0, "matched": 0.0}


@dataclass(frozen=True)
class AblationJob:
    """What a user asked for.

    Attributes:
        subject: model, pole with its strength, recipe.
        split: of the questions; whoever chooses by the result asks ``search``.
        questions: how many.
        answer_tokens: longest answer.
        personas: pairs that score an answer.
        seed: of intervals.
    """

    subject: ModelJob
    split: Literal["search", "test"] = "search"
    questions: int = 24
    answer_tokens: int = 64
    personas: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Variation:
    """One row of the table.

    Attributes:
        setting: what is varied.
        value: to what.
        strength: of the pole, times the job's own.
        section: what is changed in the recipe.
    """

    setting: str
    value: float | str
    strength: float = 1.0
    section: PoleSection = field(default_factory=PoleSection)


def variations(recipe: Recipe, strength: float = 1.0) -> tuple[list[Variation], list[str]]:
    """The rows for a recipe, and why there are no others.

    Args:
        recipe: for the pole.
        strength: of the pole, part of the gamma that is shown.
    """
    gamma = recipe.rule.gamma * strength
    rows, notes = [Variation("gamma", round(gamma * factor, 4), factor) for factor in STRENGTHS], []
    if recipe.rule.shift or recipe.rule.clamp:
        for threshold in THRESHOLDS:
            select = {"threshold": threshold, "at_least": 0, "at_most": None}
            rows.append(Variation("threshold", threshold, section=PoleSection(select=select)))
    else:
        notes.append("threshold: left out, as the recipe steers no neurons by it")
    on = [part for part in PARTS if getattr(recipe.rule, part)]
    if len(on) > 1:
        for part in on:
            rule = _OFF | {part: getattr(recipe.rule, part)}
            rows.append(Variation("parts", f"{part} only", section=PoleSection(rule=rule)))
        rows.append(Variation("parts", "all"))
    else:
        notes.append(f"parts: left out, as {on[0]} is the only one that the recipe has")
    return rows, notes


def ablate(job: AblationJob, progress: Progress) -> AblationRecord:
    """Vary gamma, the threshold, the parts and, in transformers, which tokens are steered; prompts are put beside it.

    Raises:
        NptiError: something is wrong with the job, or the recipe's own rule does nothing.
    """
    with opened(job.subject, progress) as at:
        recipe, spec = at.recipe.for_pole(at.spec.pole), at.spec
        questions = (
            search_questions(at.bench, at.recipe, job.questions)
            if job.split == "search"
            else at.bench.test(job.questions)
        )
        profile = at.profile(at.recipe)
        build_rule(profile, spec, recipe)
        engine = at.engine()
        test = Test(at.bench, spec.sign, questions, at.recipe, job.answer_tokens, job.personas, job.seed)
        progress.start("unsteered", 1)
        measure = Measure(engine, test, trial_passages())
        progress.advance(1)
        sweeps, notes = _Sweeps(at, recipe, profile, engine, measure, progress).all()
        return AblationRecord(
            model={"name": at.source.name, "fingerprint": at.source.fingerprint},
            pole=spec.pole,
            recipe=at.recipe.name,
            settings={
                "split": job.split,
                "questions": len(questions),
                "strength": spec.strength,
                "answer_tokens": job.answer_tokens,
                "personas": job.personas,
                "passages": PASSAGES,
                "seed": job.seed,
                "bench": at.bench.digest,
            },
            base_fluency=measure.fluency,
            steering=steering(at.recipe, spec.pole),
            sweeps=sweeps,
            notes=notes,
        )


@dataclass(frozen=True)
class _Sweeps:
    at: Opened
    recipe: Recipe  # for the pole
    profile: NeuronProfile
    engine: Engine
    measure: Measure
    progress: Progress
    known: dict[str, Figures] = field(default_factory=dict)  # by rule: settings may come to the same

    def all(self) -> tuple[list[Sweep], list[str]]:
        """Everything, and notes on what is left out."""
        rows, notes = variations(self.recipe, self.at.spec.strength)
        self.progress.start("ablate", len(rows))
        points: dict[str, list[SweepPoint]] = {}
        for row in rows:
            try:
                figures = self._figures(self._rule(row))
            except (ProfileError, EvaluationError) as error:
                notes.append(f"{row.setting} {row.value}: left out: {error}")
            else:
                points.setdefault(row.setting, []).append(_point(row.value, figures))
            self.progress.advance(1)
        if isinstance(self.engine, TorchEngine):
            points["prompt tokens"] = self._where(self.engine)
        else:
            notes.append("prompt tokens: left out, as a file steers every token; --runtime transformers has it")
        points[PROMPT] = [_point(how, self.measure.prompted(how)) for how in PROMPTINGS if how != "plain"]
        return [Sweep(setting=setting, points=found) for setting, found in points.items()], notes

    def _rule(self, row: Variation) -> SteeringRule:
        spec = self.at.spec
        recipe = with_section(self.recipe, spec.pole, row.section)
        return build_rule(self.profile, replace(spec, strength=spec.strength * row.strength), recipe)

    def _figures(self, rule: SteeringRule) -> Figures:
        constant = b"" if rule.constant is None else rule.constant.tobytes()
        key = hashlib.sha256(rule.shift.tobytes() + rule.clamp.tobytes() + constant).hexdigest()
        if key not in self.known:
            self.known[key] = self.measure.rule(rule)
        return self.known[key]

    def _where(self, engine: TorchEngine) -> list[SweepPoint]:
        rule = build_rule(self.profile, self.at.spec, self.recipe)
        steered = self._figures(rule)
        with self._on_response(engine, rule) as runtime:
            answered = self.measure.opened(runtime)
        return [_point("steered", steered), _point("left alone", answered)]

    @contextmanager
    def _on_response(self, engine: TorchEngine, rule: SteeringRule) -> Iterator[Any]:
        """A way to open the model with the rule on tokens of the answer alone, as an attached adapter has it."""
        from npti_export.export.peft import write_adapter
        from npti_export.rule_io import Provenance, SavedRule
        from npti_export.runtimes.transformers import TransformersRuntime

        source, runtime = self.at.source, cast(TransformersRuntime, engine.base)
        about = Provenance(
            trait=str(self.at.spec),
            gamma=self.recipe.rule.gamma,
            recipe=self.recipe.to_json(),
            model=source.name,
            model_type=source.model_type,
            fingerprint=source.identity,
        )
        with TemporaryFolder() as folder:
            write_adapter(SavedRule(rule, about, "response"), folder)
            yield _attached(runtime, str(folder))


@contextmanager
def _attached(runtime: Any, folder: str) -> Iterator[Runtime]:
    import npti_export

    with npti_export.attach(runtime.model, folder, where="response", any_model=True):
        yield runtime


def _point(value: float | str, figures: Figures) -> SweepPoint:
    return SweepPoint(value=value, gain=figures.gain, fluency=figures.fluency, kl_neutral=figures.damage)
