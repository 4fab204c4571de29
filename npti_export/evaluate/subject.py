"""What is evaluated: an artifact and the model that it was made from, each open in the runtime that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from npti_export.bench import TraitBench
from npti_export.endings.base import Format
from npti_export.errors import ArchitectureError, EvaluationError
from npti_export.evaluate.engine import Engine, engine_for
from npti_export.identify.profiles import Place
from npti_export.job import Job, Prepared, prepared
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import ModelSource, resolve_model
from npti_export.pipeline import open_ending, open_models
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule_io import SavedRule, artifact_format
from npti_export.runtimes.base import Runtime
from npti_export.traits import TraitSpec, parse_trait

if TYPE_CHECKING:
    from npti_export.runtimes.transformers import TransformersRuntime


@dataclass(frozen=True)
class SubjectJob:
    """Which artifact, and where it runs.

    Attributes:
        artifact: a steered GGUF, adapter, steered checkpoint or control vector of ours.
        model: its unsteered model; None takes the one inside or named by it.
        trait: the pole to judge by; None takes the artifact's, or the first of several.
        bench: instead of the shipped bench.
        trait_dirs: folders of traits of the user's own that the artifact records by name.
        any_model: accept a model of another fingerprint.
        runtime: where it runs.
        cache: of identifications; None keeps none.
    """

    artifact: Path
    model: str | None = None
    trait: str | None = None
    bench: Path | None = None
    trait_dirs: tuple[Path, ...] = ()
    any_model: bool = False
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    cache: Path | None = None


@dataclass(frozen=True)
class Subject:
    """An artifact, opened.

    Attributes:
        artifact: where it is.
        format: of it.
        source: the unsteered model.
        spec: the pole that is judged: the artifact's, or the first of several.
        saved: its rule.
        recipe: that it was made with.
        benches: of its traits.
        base: the unsteered model, in the runtime and the types of the artifact.
        scorer: the same model where it computes fastest: scores answers, and bears the baselines.
        steered: opens the artifact; ``base`` and ``scorer`` are not to be used meanwhile where :attr:`shares` is set.
        shares: whether the artifact is the base's own runtime with something attached.
        engine: runs other rules on the same model; None where no rule can be compiled for it.
        place: where profiles are made.
        models: what loads it.
    """

    artifact: Path
    format: Format
    source: ModelSource
    spec: TraitSpec
    saved: SavedRule
    recipe: Recipe
    benches: dict[str, TraitBench]
    base: Runtime
    scorer: Runtime
    steered: Callable[[], AbstractContextManager[Runtime]]
    shares: bool
    engine: Engine | None
    place: Place
    models: Models

    @property
    def bench(self) -> TraitBench:
        """Of the pole that is judged."""
        return self.benches[self.spec.trait]


@contextmanager
def opened(job: SubjectJob, timings: Timings, progress: Progress) -> Iterator[Subject]:
    """Check, load and open everything.

    Raises:
        NptiError: no artifact of ours, its model is not to be had, or the runtime does not run it.
    """
    kind = artifact_format(job.artifact)
    settings = job.runtime
    if kind in ("peft", "checkpoint") and settings.engine == "llama.cpp":
        raise EvaluationError(f"{job.artifact}: runs in transformers; leave --runtime out")
    described = Job(
        traits=(),
        out=None,
        rule_from=job.artifact,
        format=kind,
        model=job.model,
        bench=job.bench,
        trait_dirs=job.trait_dirs,
        any_model=job.any_model,
        runtime=settings,
        cache=job.cache,
    )
    with prepared(described) as ready:
        assert ready.saved is not None
        if not ready.traits:
            raise EvaluationError(f"{job.artifact}: does not say which trait it steers towards")
        in_torch = kind in ("peft", "checkpoint")
        models = _models(ready, timings, progress, in_torch=in_torch)
        with models:
            yield _subject(ready, kind, _pole(job, ready), models, progress)


def _models(ready: Prepared, timings: Timings, progress: Progress, *, in_torch: bool) -> Models:
    if not in_torch:
        return open_models(ready, timings, progress, verifies=False)
    from dataclasses import replace

    settings = replace(ready.job.runtime, engine="transformers")
    return Models(ready.source, settings, timings, progress, verifies=False)


def _pole(job: SubjectJob, ready: Prepared) -> TraitSpec:
    """The pole to judge by.

    Raises:
        EvaluationError: the artifact does not steer that trait.
    """
    if job.trait is None:
        return ready.traits[0]
    wanted = parse_trait(job.trait)
    if wanted.trait not in ready.benches:
        steers = " ".join(spec.pole for spec in ready.traits)
        raise EvaluationError(f"--trait {job.trait}: {job.artifact} steers towards {steers}; leave it out, or name one")
    return wanted


def _subject(ready: Prepared, kind: Format, spec: TraitSpec, models: Models, progress: Progress) -> Subject:
    source, recipe, artifact = ready.source, ready.recipe, ready.job.rule_from
    assert artifact is not None
    assert ready.saved is not None
    scorer = models.fast()
    base: Runtime = models.llama() if models.engine == "llama.cpp" else scorer
    place = Place(models.fast, source, models.dtype(), models.device(), ready.job.cache)
    engine: Engine | None
    try:
        engine = engine_for(source, models, recipe)
    except ArchitectureError:
        engine = None
    return Subject(
        artifact,
        kind,
        source,
        spec,
        ready.saved,
        recipe,
        ready.benches,
        base,
        scorer,
        _opener(ready, kind, models, progress),
        kind == "peft",
        engine,
        place,
        models,
    )


def _opener(
    ready: Prepared, kind: Format, models: Models, progress: Progress
) -> Callable[[], AbstractContextManager[Runtime]]:
    artifact, sequences = ready.job.rule_from, ready.recipe.identify.batch_size
    assert artifact is not None

    @contextmanager
    def attached() -> Iterator[Runtime]:
        import npti_export

        runtime = cast("TransformersRuntime", models.fast())
        with npti_export.attach(runtime.model, str(artifact)):
            yield runtime

    @contextmanager
    def checkpoint() -> Iterator[Runtime]:
        from npti_export.runtimes.transformers import TransformersRuntime

        progress.note(f"load {artifact.name}")
        yield TransformersRuntime(resolve_model(str(artifact)), device=models.settings.device, dtype=models.dtype())

    def file() -> AbstractContextManager[Runtime]:
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

        if kind == "control-vector":
            runtime = open_ending(ready, models).in_llamacpp(artifact, ready.source)
            assert runtime is not None
            return runtime
        return LlamaCppRuntime(artifact, models.settings.llama, sequences=sequences, source=ready.source)

    openers: dict[str, Callable[[], AbstractContextManager[Runtime]]] = {"peft": attached, "checkpoint": checkpoint}
    return openers.get(kind, file)


def unsteered(runtime: Runtime) -> AbstractContextManager[Runtime]:
    """A runtime that is open already, as if it were opened."""
    return nullcontext(runtime)
