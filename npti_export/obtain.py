"""The profiles of a job: given, cached, or identified now, by this process or by workers."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path

from npti_export.bench import TraitBench
from npti_export.distribute.cluster import place_of
from npti_export.distribute.spread import Request, answered
from npti_export.files import translate_os_errors
from npti_export.identify.profiles import Place, anything_kept, needed, nothing_to_resume, profile_for
from npti_export.job import Prepared
from npti_export.loader import Models, Timings
from npti_export.profile import NeuronProfile
from npti_export.profile_io import profile_paths, save_profiles
from npti_export.progress import Progress, Silent
from npti_export.traits import SIGNS, Sign


def obtain_profiles(ready: Prepared, models: Models, timings: Timings, progress: Progress) -> dict[str, NeuronProfile]:
    """The profile of each trait; saved where the job says."""
    profiles = dict(ready.profiles)
    wanted = {trait: bench for trait, bench in ready.benches.items() if trait not in profiles}
    if wanted:
        started, loaded = time.perf_counter(), timings.seconds.get("load", 0.0)
        profiles |= _identified(ready, wanted, models, progress)
        loading = timings.seconds.get("load", 0.0) - loaded
        timings.seconds["identify"] = timings.seconds.get("identify", 0.0) + time.perf_counter() - started - loading
    if ready.job.save_profile is not None:
        _save(ready, profiles, ready.job.save_profile)
    return profiles


def _save(ready: Prepared, profiles: dict[str, NeuronProfile], place: Path) -> None:
    select, force = ready.kept.select, ready.job.force
    pairs = list(zip(profiles.values(), profile_paths(place, list(profiles)), strict=True))
    made = len(pairs) > 1 and not place.exists()
    if made:
        with translate_os_errors(place):
            place.mkdir()
    try:
        save_profiles(pairs, force=force, threshold=select.threshold, at_least=select.at_least)
    except BaseException:
        if made:
            with suppress(OSError):  # another job may have put something there
                place.rmdir()
        raise


def _identified(
    ready: Prepared, wanted: dict[str, TraitBench], models: Models, progress: Progress
) -> dict[str, NeuronProfile]:
    job, recipe, kept = ready.job, ready.recipe, None if ready.job.save_profile is None else ready.kept
    nothing_else = job.out is None and kept is not None  # is asked for but profiles
    signs = {trait: SIGNS if nothing_else else _signs(ready, trait) for trait in wanted}
    # workers elsewhere say themselves what they compute in, whatever this machine has
    elsewhere = job.distribution is not None and place_of(job.distribution) is not None
    computed = ("", "") if elsewhere else (models.dtype(), models.device())
    place = Place(models.fast, ready.source, *computed, job.cache)
    with ExitStack() as stack:
        if job.distribution is None:
            if job.resume and not any(
                anything_kept(place, bench, signs[trait], recipe, kept) for trait, bench in wanted.items()
            ):
                raise nothing_to_resume(job.cache)
        else:
            asked = {trait: needed(bench, signs[trait], recipe, kept) for trait, bench in wanted.items()}
            neurons = {trait: by for trait, (by, _) in asked.items() if by is not None}
            matched = {trait: poles for trait, (_, poles) in asked.items()}
            request = Request(wanted, neurons, matched, recipe, job.model, job.resume)
            place, _ = stack.enter_context(answered(request, job.distribution, place, models, progress))
            progress = Silent()  # all is done: what follows reads it
        return {
            trait: profile_for(place, bench, signs[trait], recipe, progress, neurons=kept)
            for trait, bench in wanted.items()
        }


def _signs(ready: Prepared, trait: str) -> tuple[Sign, ...]:
    return tuple(sorted({spec.sign for spec in ready.traits if spec.trait == trait}))
