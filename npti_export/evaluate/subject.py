"""What is evaluated: an artifact and the model that it was made from, each open in the runtime that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from npti_export.bench import TraitBench
from npti_export.endings.base import Format
from npti_export.errors import ArchitectureError, EvaluationError
from npti_export.evaluate.engine import Engine, engine_for
from npti_export.export.control_vector import read_directions
from npti_export.gguf.shards import read_model
from npti_export.identify.profiles import Place
from npti_export.job import Job, Prepared, prepared
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import ModelSource, resolve_model
from npti_export.pipeline import open_ending, open_models
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.rule_io import SavedRule, Where, artifact_format
from npti_export.runtimes.base import Runtime
from npti_export.traits import TraitSpec, parse_trait

if TYPE_CHECKING:
    from npti_export.runtimes.transformers import TransformersRuntime

_IN_TORCH = ("peft", "checkpoint")
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class SubjectJob:
    """Which artifact, and where it runs.

    Attributes:
        artifact: a steered GGUF, adapter, steered checkpoint or control vector of ours, or any GGUF.
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
        saved: its rule; None for a GGUF that holds none: somebody's fine-tune, say.
        recipe: that it was made with; for such a file, the one for the model.
        benches: of its traits.
        base: the unsteered model, in the runtime and the types of the artifact.
        scorer: the same model where it computes fastest, or in the runtime that the user wants: scores answers, and
            bears the other methods.
        steered: opens the artifact; ``base`` and ``scorer`` are not to be used meanwhile where :attr:`shares` is set.
        read: opens an adapter that steers the response only where a text is read in one pass, all of it as if the
            model had said it: there is no response there that it could steer. None where the artifact is the same.
        shares: whether the artifact is the base's own runtime with something attached.
        engine: runs other rules on the weights of ``scorer``; None where no rule can be compiled for it.
        place: where profiles are made.
        models: what loads it.
        limit: KL to its rule that is accepted; None where that was not measured.
    """

    artifact: Path
    format: Format
    source: ModelSource
    spec: TraitSpec
    saved: SavedRule | None
    recipe: Recipe
    benches: dict[str, TraitBench]
    base: Runtime
    scorer: Runtime
    steered: Callable[[], AbstractContextManager[Runtime]]
    read: Callable[[], AbstractContextManager[Runtime]] | None
    shares: bool
    engine: Engine | None
    place: Place
    models: Models
    limit: float | None

    @property
    def bench(self) -> TraitBench:
        """Of the pole that is judged."""
        return self.benches[self.spec.trait]


@contextmanager
def opened(job: SubjectJob, timings: Timings, progress: Progress, questions: int = 0) -> Iterator[Subject]:
    """Check, load and open everything.

    Args:
        job: which artifact.
        timings: told how long loading took.
        progress: told of each load.
        questions: test questions that there must be, which is said before anything is loaded.

    Raises:
        NptiError: no artifact of ours, its model is not to be had, or the runtime does not run it.
    """
    kind = artifact_format(job.artifact)
    settings = job.runtime
    if kind in _IN_TORCH:
        if settings.engine == "llama.cpp":
            raise EvaluationError(f"{job.artifact}: runs in transformers; leave --runtime out")
        settings = replace(settings, engine="transformers")
    described = Job(
        traits=() if _holds_rule(job.artifact, kind) else (_said_pole(job),),
        out=None,
        rule_from=job.artifact if _holds_rule(job.artifact, kind) else None,
        format=kind,
        model=job.model,
        bench=job.bench,
        trait_dirs=job.trait_dirs,
        any_model=job.any_model,
        runtime=settings,
        cache=job.cache,
    )
    with prepared(described) as ready:
        if not ready.traits:
            raise EvaluationError(f"{job.artifact}: does not say which trait it steers towards")
        if kind not in _IN_TORCH and ready.source.kind != "gguf":
            raise EvaluationError(f"{job.artifact}: runs in llama.cpp; give the GGUF that it was made from as --base")
        if ready.saved is None:
            _check_vocabulary(job.artifact, ready.source)
        spec = _pole(job, ready)
        ready.benches[spec.trait].test(questions)
        with open_models(ready, timings, progress, verifies=False) as models:
            yield _subject(job.artifact, ready, spec, models, progress)


def _holds_rule(artifact: Path, kind: Format) -> bool:
    return kind != "gguf" or "npti.rule" in read_model(artifact).by_key


def _said_pole(job: SubjectJob) -> TraitSpec:
    """The pole of a file that does not say it.

    Raises:
        EvaluationError: the user does not say it either, or not which model the file was made from.
    """
    if job.model is None or job.trait is None:
        raise EvaluationError(
            f"{job.artifact}: holds no steering rule; to evaluate it all the same, name the pole that it should show "
            "by --trait and the GGUF that it was made from by --base"
        )
    return parse_trait(job.trait)


def _check_vocabulary(artifact: Path, base: ModelSource) -> None:
    """Token ids of one are scored by the other."""
    if read_model(artifact).get(_TOKENS) != read_model(base.path).get(_TOKENS):
        raise EvaluationError(f"{artifact}: has other tokens than {base.path}; it was made from another model")


def _pole(job: SubjectJob, ready: Prepared) -> TraitSpec:
    """The pole to judge by.

    Raises:
        EvaluationError: the artifact does not steer that trait.
    """
    if job.trait is None:
        return ready.traits[0]
    wanted = parse_trait(job.trait, ready.benches)
    if wanted.trait not in ready.benches:
        steers = " ".join(spec.pole for spec in ready.traits)
        raise EvaluationError(f"--trait {job.trait}: {job.artifact} steers towards {steers}; leave it out, or name one")
    return wanted


def _subject(artifact: Path, ready: Prepared, spec: TraitSpec, models: Models, progress: Progress) -> Subject:
    source, recipe, kind = ready.source, ready.recipe, ready.job.format
    scorer = models.fast()
    base: Runtime = scorer if kind in _IN_TORCH else models.llama()
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
        _opener(artifact, ready, models, progress),
        None if ready.where == "all" else lambda: _attached(artifact, models, "all"),
        kind == "peft",
        engine,
        place,
        models,
        _limit(artifact, ready, models),
    )


def _limit(artifact: Path, ready: Prepared, models: Models) -> float | None:
    """The most that an artifact may be away from its rule, as when it was verified; None where nobody did."""
    from npti_export.verify import Fidelity

    if ready.saved is None:
        return None
    try:
        measured = Fidelity(**ready.saved.about.fidelity)  # type: ignore[arg-type]
    except TypeError:  # not measured, or by a version that measured something else
        return None
    ending = open_ending(ready, models)
    return measured.limit(ready.recipe, exact=ending.exact(artifact), share=ending.share)


def _opener(
    artifact: Path, ready: Prepared, models: Models, progress: Progress
) -> Callable[[], AbstractContextManager[Runtime]]:
    kind, source, sequences = ready.job.format, ready.source, ready.recipe.identify.batch_size

    @contextmanager
    def checkpoint() -> Iterator[Runtime]:
        from npti_export.runtimes.transformers import TransformersRuntime

        progress.note(f"load {artifact.name}")
        yield TransformersRuntime(resolve_model(str(artifact)), device=models.settings.device, dtype=models.dtype())

    def file() -> AbstractContextManager[Runtime]:
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

        settings = models.settings.llama
        if kind == "control-vector":
            directions = read_directions(artifact, source.shape.layers, source.shape.hidden)
            return LlamaCppRuntime(source.path, settings, sequences=sequences, source=source, control_vector=directions)
        return LlamaCppRuntime(artifact, settings, sequences=sequences, source=source)

    openers: dict[str, Callable[[], AbstractContextManager[Runtime]]] = {
        "peft": lambda: _attached(artifact, models),
        "checkpoint": checkpoint,
    }
    return openers.get(kind, file)


@contextmanager
def _attached(artifact: Path, models: Models, where: Where | None = None) -> Iterator[Runtime]:
    import npti_export

    runtime = cast("TransformersRuntime", models.fast())
    # whose rule it is was checked when the model was found
    with npti_export.attach(runtime.model, str(artifact), where=where, any_model=True):
        yield runtime


def unsteered(runtime: Runtime) -> AbstractContextManager[Runtime]:
    """A runtime that is open already, as if it were opened."""
    return nullcontext(runtime)
