"""The profile that a recipe asks for: neurons where it steers neurons, matched constants where it adds these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from npti_export.bench import TraitBench
from npti_export.checked import encode_checked, load_checked
from npti_export.errors import ArchitectureError, DamagedError, ProfileError
from npti_export.files import atomic_output, translate_os_errors
from npti_export.identify.collect import cache_key, collect, resume, shards_beside, state_path
from npti_export.identify.matched import match
from npti_export.identify.shards import Shards
from npti_export.models import ModelSource
from npti_export.profile import Matrix, NeuronProfile, profile_from_stats
from npti_export.progress import Progress, Silent
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Runtime
from npti_export.stats import ContrastStats
from npti_export.traits import Sign

_KEY = "constant"
_CACHE_FORMAT = 2  # raise when the meaning of a cached constant changes


@dataclass(frozen=True)
class Place:
    """Where a profile is made.

    Attributes:
        load: gives the model; not called where nothing is left to do.
        source: the model's identity.
        dtype: what it computes in, part of the cache key.
        device: the kind of device, likewise.
        cache: folder of the saved state; None keeps nothing.
    """

    load: Callable[[], Runtime]
    source: ModelSource
    dtype: str
    device: str
    cache: Path | None


def identified(
    place: Place, bench: TraitBench, recipe: Recipe, progress: Progress
) -> tuple[ContrastStats, NeuronProfile]:
    """What was counted of a trait's neurons, and the profile that it gives.

    Raises:
        NptiError: see :func:`npti_export.identify.collect.collect`.
    """
    stats, origin = collect(
        place.load,
        place.source,
        bench,
        recipe,
        progress,
        dtype=place.dtype,
        device=place.device,
        cache=place.cache,
    )
    profile = profile_from_stats(bench.trait, stats.plus, stats.minus, place.source, recipe.rule.percentile, origin)
    return stats, profile


def profile_for(
    place: Place,
    bench: TraitBench,
    signs: Sequence[Sign],
    recipe: Recipe,
    progress: Progress,
    *,
    neurons: Recipe | None = None,
) -> NeuronProfile:
    """What a recipe needs to know of a trait to steer towards some of its poles.

    Args:
        place: where it runs.
        bench: of the trait.
        signs: the poles.
        recipe: its ``prompt``, ``identify`` and ``rule`` sections.
        progress: told of each batch and pass.
        neurons: the recipe by which neurons are identified in any case, for a profile that is kept.

    Raises:
        NptiError: see :func:`identified` and :func:`npti_export.identify.matched.match`.
    """
    neurons, matched = needed(bench, signs, recipe, neurons)
    if neurons is not None:
        _, profile = identified(place, bench, neurons, progress)
    else:
        shape = place.source.shape
        nothing = np.zeros((shape.layers, shape.width), np.float32)
        origin = {"model": place.source.name, "questions": 0, "bench": bench.digest}
        profile = NeuronProfile(bench.trait, nothing, nothing, nothing, nothing, place.source.fingerprint, origin)
    found = {sign: _matched(place, bench, sign, recipe, progress) for sign in matched}
    return replace(profile, matched_plus=found.get("+"), matched_minus=found.get("-"))


def needed(
    bench: TraitBench, signs: Sequence[Sign], recipe: Recipe, neurons: Recipe | None
) -> tuple[Recipe | None, tuple[Sign, ...]]:
    """The recipe by which :func:`profile_for` identifies neurons, if it does, and the poles that it matches for."""
    rules = {sign: recipe.for_pole(f"{bench.trait}{sign}").rule for sign in signs}
    if neurons is None and any(rule.by_neurons for rule in rules.values()):
        neurons = recipe
    return neurons, tuple(sign for sign, rule in rules.items() if rule.matched)


def anything_kept(
    place: Place, bench: TraitBench, signs: Sequence[Sign], recipe: Recipe, neurons: Recipe | None
) -> bool:
    """Whether an earlier run, finished or not, left anything that :func:`profile_for` would go on from."""
    if place.cache is None:
        return False
    neurons, matched = needed(bench, signs, recipe, neurons)
    paths = [matched_path(place, bench, sign, recipe) for sign in matched]
    if any(path is not None and kept_constant(path, place.source) is not None for path in paths):
        return True
    if neurons is None:
        return False
    state = state_path(place.cache, bench, cache_key(place.source, bench, neurons, place.dtype, place.device))
    return resume(state, place.source, Silent())[1] > 0 or bool(Shards(shards_beside(state)).found())


def nothing_to_resume(cache: Path | None) -> ProfileError:
    """What is said of ``--resume`` where there is nothing."""
    return ProfileError(
        f"--resume: of this very job nothing is kept in {cache}; give the options of the run that was stopped, or "
        "leave --resume out to begin"
    )


def check_matchable(source: ModelSource) -> None:
    """Raise unless constants can be matched.

    Raises:
        ArchitectureError: it is a mixture of experts.
    """
    if source.architecture.mixture:
        raise ArchitectureError(
            f"{source.name}: rule.matched adds to the output of an MLP, and a mixture of experts has many; set "
            "rule.matched=0"
        )


def matched_path(place: Place, bench: TraitBench, sign: Sign, recipe: Recipe) -> Path | None:
    """Where the constant of a pole is kept; None where nothing is."""
    if place.cache is None:
        return None
    # how many questions neurons are counted on makes no difference here
    plain = recipe.model_copy(update={"identify": recipe.identify.model_copy(update={"questions": 0})})
    depends: Any = [_CACHE_FORMAT, cache_key(place.source, bench, plain, place.dtype, place.device), sign]
    depends += [recipe.identify.matched_questions]
    name = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]
    return place.cache / "matched" / f"{bench.trait}{sign}-{name}.safetensors"


def _matched(place: Place, bench: TraitBench, sign: Sign, recipe: Recipe, progress: Progress) -> Matrix:
    check_matchable(place.source)
    kept = matched_path(place, bench, sign, recipe)
    if kept is not None and kept.is_file():
        values = kept_constant(kept, place.source)
        if values is not None:
            return values
        progress.note(f"{kept}: damaged, matching afresh")
    values = match(place.load(), bench, sign, recipe, progress).constant
    if kept is not None:
        keep_constant(kept, encode_constant(values))
    return values


def encode_constant(values: Matrix) -> bytes:
    """The file that keeps a constant."""
    return encode_checked({_KEY: values}, {})


def keep_constant(path: Path, data: bytes) -> None:
    """Write what :func:`encode_constant` gave."""
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path, force=True) as temporary:
        temporary.write_bytes(data)


def kept_constant(path: Path, source: ModelSource) -> Matrix | None:
    """The constant that is kept for a model; None where it is missing or damaged."""
    values = _read(path)
    return values if values is not None and values.shape == (source.shape.layers, source.shape.width) else None


def _read(path: Path) -> Matrix | None:
    try:
        values = load_checked(path)[0].get(_KEY)
    except DamagedError:
        return None
    return values if values is not None and values.dtype == np.float32 and bool(np.isfinite(values).all()) else None
