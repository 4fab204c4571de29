"""Identification on Ray, as one step before what a single process does: afterwards its cache has every answer."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from npti_export.bench import TraitBench
from npti_export.distribute.cluster import Size, connected, gpus_of, local_cores, place_of, size_of, wants_gpu
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Distribution, Log, Match, Series, Setup
from npti_export.distribute.ray_engine import RayEngine
from npti_export.distribute.worker import files_digest
from npti_export.errors import ClusterError
from npti_export.files import translate_os_errors
from npti_export.identify.collect import cache_key, state_path
from npti_export.identify.profiles import Place, check_matchable, kept_constant, matched_path, nothing_to_resume
from npti_export.loader import Models
from npti_export.locks import alone
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.runtimes.devices import MAP
from npti_export.temporaries import Temporary, TemporaryFolder, locked
from npti_export.traits import Sign
from npti_export.version import __version__

_MARK_SECONDS = 24 * 3600  # the lock of a younger mark may not be held yet, or not be seen on another node yet


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        benches: by trait.
        neurons: by trait, the recipe by which neurons are identified; a trait may lack it.
        matched: by trait, the poles that constants are matched for.
        recipe: by which they are.
        model: what the user called it.
        resume: whether something has to be kept already.
    """

    benches: Mapping[str, TraitBench]
    neurons: Mapping[str, Recipe]
    matched: Mapping[str, Sequence[Sign]]
    recipe: Recipe
    model: str | None
    resume: bool = False


@dataclass
class _Plan:
    """What is left to be done at a place."""

    series: list[Series]
    gatherings: list[Gathering]
    matches: list[Match]
    constants: bool = False  # whether one is there

    @property
    def begun(self) -> bool:
        """Whether anything is there of an earlier run."""
        return self.constants or any(one.asked for one in self.gatherings)

    @property
    def left(self) -> bool:
        return bool(self.matches) or not all(one.finished for one in self.gatherings)

    def finish(self) -> None:
        """Merge what is all there: a driver may have been killed before it did."""
        for one in self.gatherings:
            if one.complete:
                one.finish()


@contextmanager
def answered(
    request: Request, distribution: Distribution, place: Place, models: Models, progress: Progress
) -> Iterator[tuple[Place, Log]]:
    """Have all questions answered by workers; within the block there is a place where all answers are kept.

    Traits share the workers, each of which loads the model once, and the last batches of one trait are asked beside the
    first ones of the next.

    Args:
        request: the profiles.
        distribution: the workers.
        place: what a single process would use.
        models: of this machine, not loaded.
        progress: told of every batch.

    Raises:
        NptiError: Ray is missing or the cluster too small; or what a worker says.
    """
    with ExitStack() as stack:
        cache = place.cache or stack.enter_context(TemporaryFolder())
        place = replace(place, cache=cache)
        plan, log = None, Log()
        if place_of(distribution) is None:  # workers compute in what this process would
            plan = _own_plan(request, place, progress, stack)
            plan.finish()
        if plan is None or plan.left:
            place, log = _run(request, distribution, place, plan, models, progress)
        yield place, log


def _run(
    request: Request,
    distribution: Distribution,
    place: Place,
    plan: _Plan | None,
    models: Models,
    progress: Progress,
) -> tuple[Place, Log]:
    assert place.cache is not None
    threads, gpu = models.settings.threads, wants_gpu(models, distribution)
    if distribution.gpus and not gpu:
        raise ClusterError(
            f"--gpus {distribution.gpus}: the model would not run on a GPU as it is asked to; leave it out"
        )
    with ExitStack() as stack:
        copies = stack.enter_context(TemporaryFolder())
        mark = stack.enter_context(_mark(place.cache))
        progress.start("start Ray", 1)
        ray = stack.enter_context(connected(distribution, local_cores(distribution, threads)))
        size = size_of(ray.nodes(), distribution, models.settings, gpu=gpu)
        if not size.gpus and models.settings.gpu_layers and models.engine == "llama.cpp" and gpus_of(ray.nodes()):
            progress.note("the cluster has GPUs, and no worker takes one: where its llama.cpp can, give --gpus 1")
        engine = stack.enter_context(RayEngine(ray, _setup(request, place, models, size, mark, copies), size, progress))
        hello = engine.hello()
        progress.advance(1)
        if plan is None or (hello.dtype, hello.device) != (place.dtype, place.device):
            place = replace(place, dtype=hello.dtype, device=hello.device)
            plan = _own_plan(request, place, progress, stack)
        traits = [one.series.bench.trait for one in plan.gatherings]
        traits += [one.trait for one in plan.matches if one.trait not in traits]
        total = sum(len(one.series.questions) for one in plan.gatherings) + len(plan.matches)
        progress.start(f"identify {', '.join(dict.fromkeys(traits))}", total)
        for one in plan.gatherings:
            if one.found:
                progress.note(f"{one.found} finished shards are there already ({one.shards.folder})")
            progress.advance(one.asked)
        engine.run(plan.series, plan.gatherings, plan.matches)
        return place, engine.log


def _own_plan(request: Request, place: Place, progress: Progress, stack: ExitStack) -> _Plan:
    """What is left to be done, by this job alone until ``stack`` ends: two that ask the same questions would ask each
    of them twice, and the one that has them all first would take the other's shards away."""
    plan, waited = _plan(request, place, progress), False
    for state in sorted({one.state for one in plan.series}):  # in one order, so that no two wait for each other

        def waiting(state: Path = state) -> None:
            progress.note(f"waiting for another job, which has workers answer the same questions ({state.stem})")

        waited |= stack.enter_context(alone(state.with_suffix(".shards"), waiting))
    if waited:
        plan = _plan(request, place, progress)
    _check_resumed(request, place, plan)
    return plan


def _check_resumed(request: Request, place: Place, plan: _Plan) -> None:
    if request.resume and not plan.begun:
        raise nothing_to_resume(place.cache)


def _setup(request: Request, place: Place, models: Models, size: Size, mark: Path, copies: Path) -> Setup:
    sequences = max(one.identify.batch_size for one in (request.recipe, *request.neurons.values()))
    settings = replace(models.settings, threads=size.threads)
    if size.gpus > 1:  # llama.cpp takes all that it sees by itself
        settings = replace(settings, device=MAP)
    source, host = place.source, socket.gethostname()
    return Setup(source, files_digest(source), request.model, settings, sequences, mark, copies, host, __version__)


def _plan(request: Request, place: Place, progress: Progress) -> _Plan:
    assert place.cache is not None
    plan = _Plan([], [], [])
    for trait, bench in request.benches.items():
        recipe = request.neurons.get(trait, request.recipe)
        key = cache_key(place.source, bench, recipe, place.dtype, place.device)
        series = Series(bench, recipe, state_path(place.cache, bench, key))
        plan.series.append(series)
        if trait in request.neurons:
            plan.gatherings.append(Gathering(series, place.source, progress))
        for sign in request.matched.get(trait, ()):
            check_matchable(place.source)
            path = matched_path(place, bench, sign, request.recipe)
            assert path is not None
            if kept_constant(path, place.source) is not None:
                plan.constants = True
            else:
                if path.is_file():
                    progress.note(f"{path}: damaged, matching afresh")
                plan.matches.append(Match(trait, sign, request.recipe, path))
    return plan


@contextmanager
def _mark(cache: Path) -> Iterator[Path]:
    """A file in the cache folder, by which a worker sees whether the folder is the one that it sees."""
    path = cache / "identify" / f".{uuid.uuid4().hex}.shared"
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_marks(path.parent)
        path.touch()
    handle = locked(path, wait=True)
    try:
        yield path
    finally:
        Temporary(path, handle).remove()


def _sweep_marks(folder: Path) -> None:
    """Remove marks that killed runs left: old ones that nobody holds."""
    for old in folder.glob(f".{'[0-9a-f]' * 32}.shared"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _MARK_SECONDS:
                handle = locked(old, wait=False)
                if handle is not None:
                    Temporary(old, handle).remove()
