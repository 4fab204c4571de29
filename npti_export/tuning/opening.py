"""The model, pole and recipe that are tuned, each checked and opened."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from npti_export.bench import TraitBench
from npti_export.benches import load_benches
from npti_export.errors import EvaluationError, ProfileError, TraitError
from npti_export.evaluate.engine import Engine, engine_for
from npti_export.identify.profiles import Place, profile_for
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import ModelSource, resolve_model
from npti_export.profile import NeuronProfile
from npti_export.progress import Progress
from npti_export.recipe import Recipe, select_recipe
from npti_export.traits import TraitSpec

Method = Literal["neurons", "mean", "matched"]
METHODS: tuple[Method, ...] = ("neurons", "mean", "matched")  # what a rule may be made of
_OF_ONE_MLP = ("mean", "matched")  # constants for the input of a layer's down projection


@dataclass(frozen=True)
class ModelJob:
    """What is tuned, and where it runs.

    Attributes:
        trait: the pole.
        model: see :func:`npti_export.models.resolve_model`.
        recipe: name or path; None picks by model.
        overrides: ``section.key=value`` strings.
        bench: instead of the shipped bench.
        runtime: where the model runs.
        cache: of identifications; None keeps none.
    """

    trait: TraitSpec
    model: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    bench: Path | None = None
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    cache: Path | None = None


@dataclass(frozen=True)
class Opened:
    """What is tuned, opened.

    Attributes:
        job: what was asked for.
        source: the model.
        recipe: resolved.
        bench: of the trait.
    """

    job: ModelJob
    source: ModelSource
    recipe: Recipe
    bench: TraitBench
    _models: Models
    _progress: Progress

    @property
    def spec(self) -> TraitSpec:
        """The pole."""
        return self.job.trait

    @property
    def place(self) -> Place:
        """Where profiles are made."""
        models = self._models
        return Place(models.fast, self.source, models.dtype(), models.device(), self.job.cache)

    def methods(self, asked: Sequence[Method]) -> tuple[Method, ...]:
        """Those that the model can have; a note says which it cannot.

        Raises:
            EvaluationError: none is left.
        """
        if not self.source.architecture.mixture:
            return tuple(asked)
        left = tuple(one for one in asked if one not in _OF_ONE_MLP)
        dropped = ", ".join(one for one in asked if one in _OF_ONE_MLP)
        why = f"{self.source.name} is a mixture of experts, whose layers have no one MLP to add a constant to"
        if not left:
            raise EvaluationError(f"--methods {dropped}: {why}; give --methods neurons")
        if dropped:
            self._progress.note(f"tuned without {dropped}: {why}")
        return left

    def engine(self) -> Engine:
        """Load the model.

        Raises:
            ArchitectureError: no rule can be run on it.
        """
        return engine_for(self.source, self._models, self.recipe)

    def profile(self, recipe: Recipe) -> NeuronProfile:
        """What a recipe needs to know."""
        return profile_for(self.place, self.bench, [self.spec.sign], recipe, self._progress)

    def whole_profile(self, methods: Collection[Method]) -> NeuronProfile:
        """Everything that rules by some methods need to know of the pole, as far as the model has it.

        Raises:
            NptiError: see :func:`npti_export.identify.profiles.profile_for`; where nothing but ``matched`` is asked
                for, also that the model has none.
        """
        counts = bool({"neurons", "mean"}.intersection(methods))
        if "matched" in methods:
            try:
                return self._profile(matched=1.0, whole=counts)
            except ProfileError as error:  # the stream does not follow; where nothing was answered, it is raised again
                if not counts:
                    raise
                self._progress.note(f"tuned without matched constants: {error}")
        return self._profile(matched=0.0, whole=True)

    def _profile(self, *, matched: float, whole: bool) -> NeuronProfile:
        rule = self.recipe.rule.model_copy(update={"matched": matched, "shift": whole, "clamp": False, "constant": 0.0})
        recipe = self.recipe.model_copy(update={"rule": rule, "poles": {}})
        neurons = recipe if whole else None
        return profile_for(self.place, self.bench, [self.spec.sign], recipe, self._progress, neurons=neurons)


@contextmanager
def opened(job: ModelJob, progress: Progress) -> Iterator[Opened]:
    """Check everything that can be checked at once; the model is loaded when it is needed.

    Raises:
        NptiError: whatever is wrong with the job.
    """
    source = resolve_model(job.model)
    recipe = select_recipe(job.recipe, source.fingerprint, job.overrides)
    bench = load_benches([job.trait], job.bench)[job.trait.trait]
    if recipe.for_pole(job.trait.pole).rule.by_neurons:
        bench.search(recipe.identify.questions, recipe.identify.seed)
    sequences = recipe.identify.batch_size
    with Models(source, job.runtime, Timings(), progress, verifies=False, sequences=sequences) as models:
        yield Opened(job, source, recipe, bench, models, progress)


def plain_pole(spec: TraitSpec) -> TraitSpec:
    """A pole whose strength is the tuner's to choose.

    Raises:
        TraitError: it has one already.
    """
    if spec.strength != 1.0:
        raise TraitError(f"--trait {spec}: the strength is what is looked for; name the pole alone, {spec.pole}")
    return replace(spec, strength=1.0)
