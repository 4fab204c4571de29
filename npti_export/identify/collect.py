"""Identification: answer every search question as both poles, count neurons, survive being killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npti_export.bench import Question, TraitBench, pair_with_personas
from npti_export.errors import ProfileError
from npti_export.files import translate_os_errors
from npti_export.models import ModelSource
from npti_export.profile import NeuronProfile, profile_from_stats
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Exchange, Runtime, chat
from npti_export.stats import ActivationStats, load_stats, save_stats
from npti_export.traits import SIGNS, Sign

_CACHE_FORMAT = 1  # raise when the meaning of cached statistics changes


def cache_folder() -> Path:
    """Where unfinished and finished identifications are kept (``NPTI_CACHE`` overrides)."""
    import os

    from platformdirs import user_cache_path

    return Path(os.environ["NPTI_CACHE"]) if os.environ.get("NPTI_CACHE") else user_cache_path("npti-export")


def identify(
    load_runtime: Callable[[], Runtime],
    source: ModelSource,
    bench: TraitBench,
    recipe: Recipe,
    progress: Progress,
    *,
    dtype: str,
    device: str,
    cache: Path | None,
) -> NeuronProfile:
    """Find how each neuron behaves under both poles of a trait.

    Every search question is answered once as each pole, in batches; after each batch the statistics are saved
    under a key of everything that they depend on, so that a killed run goes on where it stopped and a finished
    one is not repeated.

    Args:
        load_runtime: gives the model; not called where nothing is left to do.
        source: the model's identity.
        bench: personas and questions.
        recipe: its ``prompt``, ``identify`` and ``rule.percentile`` settings.
        progress: told of each batch.
        dtype: what the runtime computes in, part of the cache key.
        device: the kind of device that it computes on, likewise.
        cache: folder of the saved state; None keeps nothing.

    Raises:
        BenchError: fewer questions than asked for.
        ProfileError: the model answered nothing.
    """
    settings = recipe.identify
    questions = bench.search(settings.questions, settings.seed)
    per_batch = max(1, settings.batch_size // 2)  # each question is decoded as both poles
    batches = [questions[start : start + per_batch] for start in range(0, len(questions), per_batch)]
    key = _cache_key(source, bench, recipe, dtype, device)
    state = None if cache is None else cache / "identify" / f"{bench.trait}-{key}.safetensors"
    stats, done = _resume(state, source, progress)
    runtime = load_runtime() if done < len(batches) else None
    progress.start(f"identify {bench.trait}", len(questions))
    progress.advance(sum(len(batch) for batch in batches[:done]))
    if runtime is not None:
        first = 0
        for index, batch in enumerate(batches):
            if index >= done:
                fresh = _run_batch(runtime, bench, batch, first, recipe)
                stats = {sign: stats[sign] + fresh[sign] for sign in SIGNS}
                if state is not None:
                    _save(state, stats, index + 1)
                progress.advance(len(batch), sum(one.tokens for one in fresh.values()))
            first += len(batch)
    origin = {
        "recipe": json.loads(recipe.to_json()),
        "bench": bench.digest,
        "questions": len(questions),
        "dtype": dtype,
        "key": key,
    }
    return profile_from_stats(bench.trait, stats["+"], stats["-"], source, recipe.rule.percentile, origin)


def contrast_prompts(
    runtime: Runtime,
    bench: TraitBench,
    questions: Sequence[Question],
    sign: Sign,
    recipe: Recipe,
    first: int = 0,
) -> list[tuple[int, ...]]:
    """The questions asked of a persona of one pole each; ``first`` is the index of the first in the whole series."""
    personas = pair_with_personas(bench, sign, first + len(questions), recipe.identify.seed)[first:]
    return [
        runtime.encode(
            chat(
                recipe.prompt.system.replace("{persona}", persona.text),
                recipe.prompt.user.replace("{question}", question.text),
            )
        )
        for question, persona in zip(questions, personas, strict=True)
    ]


def _run_batch(
    runtime: Runtime, bench: TraitBench, batch: Sequence[Question], first: int, recipe: Recipe
) -> dict[Sign, ActivationStats]:
    prompts = [prompt for sign in SIGNS for prompt in contrast_prompts(runtime, bench, batch, sign, recipe, first)]
    exchanges: list[Exchange] = runtime.generate(
        prompts,
        max_new_tokens=recipe.identify.max_new_tokens,
        repetition_penalty=recipe.identify.repetition_penalty,
    )
    half = len(batch)
    return {"+": runtime.activation_stats(exchanges[:half]), "-": runtime.activation_stats(exchanges[half:])}


def _cache_key(source: ModelSource, bench: TraitBench, recipe: Recipe, dtype: str, device: str) -> str:
    # A directory's files are what a model is made of; a changed one, weights or chat template, is another model.
    files = list(source.shards or [source.path])
    if source.path.is_dir():
        files = sorted(path for path in source.path.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    depends: dict[str, Any] = {
        "format": _CACHE_FORMAT,
        "model": [source.fingerprint, str(source.path.resolve()), stats],
        "bench": bench.digest,
        "prompt": recipe.prompt.model_dump(),
        "identify": recipe.identify.model_dump(),
        "dtype": dtype,
        "device": device,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def _resume(state: Path | None, source: ModelSource, progress: Progress) -> tuple[dict[Sign, ActivationStats], int]:
    empty = ActivationStats.empty(source.shape.layers, source.shape.width)
    fresh: dict[Sign, ActivationStats] = {"+": empty, "-": empty}
    if state is None or not state.is_file():
        return fresh, 0
    try:
        saved, record = load_stats(state)
        done = record["batches"]
        if not isinstance(done, int) or any(saved[sign].active.shape != empty.active.shape for sign in SIGNS):
            raise ProfileError("of another shape")
    except (ProfileError, KeyError, TypeError):
        progress.note(f"{state}: damaged, starting this identification afresh")
        return fresh, 0
    progress.note(f"going on from {done} finished batches ({state})")
    return {sign: saved[sign] for sign in SIGNS}, done


def _save(state: Path, stats: dict[Sign, ActivationStats], batches: int) -> None:
    with translate_os_errors(state):
        state.parent.mkdir(parents=True, exist_ok=True)
    save_stats(state, {str(sign): one for sign, one in stats.items()}, {"batches": batches})
