"""Identification: answer every search question as both poles, count neurons, survive being killed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from npti_export.bench import Question, TraitBench, pair_with_personas
from npti_export.checked import peek_record
from npti_export.errors import DamagedError, ProfileError
from npti_export.identify.batches import Batches
from npti_export.identify.shards import Shards
from npti_export.identify.stopping import expected_overlap
from npti_export.locks import alone
from npti_export.models import ModelSource
from npti_export.progress import Progress
from npti_export.recipe import Recipe
from npti_export.runtimes.base import Message, Runtime, chat
from npti_export.stats import ContrastStats, PairSpread, load_stats, save_stats
from npti_export.traits import SIGNS, Sign

_CHEAP = 0.2  # seconds in which statistics are written after every batch
_SHARE = 0.05  # of the time, that goes into writing others
_CACHE_FORMAT = 8  # raise when the meaning of cached statistics changes


def cache_folder() -> Path:
    """Where unfinished and finished identifications are kept (``NPTI_CACHE`` overrides)."""
    import os

    from platformdirs import user_cache_path

    return Path(os.environ["NPTI_CACHE"]) if os.environ.get("NPTI_CACHE") else user_cache_path("npti-export")


def collect(
    load_runtime: Callable[[], Runtime],
    source: ModelSource,
    bench: TraitBench,
    recipe: Recipe,
    progress: Progress,
    *,
    dtype: str,
    device: str,
    cache: Path | None,
) -> tuple[ContrastStats, dict[str, Any]]:
    """Let the model answer as both poles and count what every neuron does.

    Search questions are answered once as each pole, in batches, until the neurons have settled or all are asked;
    after each batch (of a large model, whose statistics take long to write, after some) they are saved under a key of
    everything that they depend on, so that a killed run goes on from there and a finished one is not repeated. When
    to stop is not part of the key: a run that is to ask more questions goes on from one that asked fewer, and one
    that could do with fewer takes all answers that are there. What workers of a cluster finished, see
    :mod:`npti_export.distribute`, is taken, not asked again.

    Args:
        load_runtime: gives the model; not called where nothing is left to do.
        source: the model's identity.
        bench: personas and questions.
        recipe: its ``prompt``, ``identify`` and ``select`` settings.
        progress: told of each batch.
        dtype: what the runtime computes in, part of the cache key.
        device: what it computes on, likewise.
        cache: folder of the saved state; None keeps nothing.

    Returns:
        The statistics, and a record of where they come from.

    Raises:
        BenchError: fewer questions than asked for.
        ProfileError: the model answered nothing.
    """
    key = cache_key(source, bench, recipe, dtype, device)
    state = None if cache is None else state_path(cache, bench, key)
    shards = None if state is None else Shards(shards_beside(state), source.shape)
    with _Keeper(state) as keeper:
        counted = _Counted(Batches(bench, recipe), *resume(state, source, progress), keeper)
        found = counted.done
        while shards is not None and counted.take(shards, progress.note):
            pass
        if shards is not None and counted.done > found:
            progress.note(f"{counted.done - found} batches are there that several workers answered ({shards.folder})")
        runtime = None if counted.settled else load_runtime()  # before the bar of the questions begins
        progress.start(f"identify {bench.trait}", counted.total)
        progress.advance(counted.asked)
        while runtime is not None and not counted.settled:
            asked, tokens = counted.asked, counted.tokens
            if shards is None or not counted.take(shards, progress.note):
                counted.add(run_batch(runtime, bench, counted.next, asked, recipe))
            progress.advance(counted.asked - asked, counted.tokens - tokens)
    if shards is not None:
        shards.forget(before=counted.done)
    if counted.asked < counted.total:
        progress.note(stopped(counted.asked, counted.total, counted.overlap))
    return counted.stats, _origin(counted) | {"dtype": dtype, "key": key}


class _Counted:
    """The statistics of a series of batches as they are added up, in order.

    Args:
        series: of the trait.
        stats: of the first batches.
        done: how many these are.
        keeper: told of each batch.
    """

    def __init__(self, series: Batches, stats: ContrastStats, done: int, keeper: _Keeper) -> None:
        self.series, self.stats, self.done, self._keeper = series, stats, done, keeper
        self.total = len(series.questions)
        self._look()

    def _look(self) -> None:
        self.asked = self.series.asked(self.done)
        self.overlap = overlap_so_far(self.stats, self.series.recipe, self.asked, self.total)

    @property
    def settled(self) -> bool:
        """Whether enough is asked."""
        return self.overlap >= self.series.recipe.identify.overlap

    @property
    def tokens(self) -> int:
        """That were counted."""
        return self.stats.plus.tokens + self.stats.minus.tokens

    @property
    def next(self) -> Sequence[Question]:
        """The questions of the next batch."""
        return self.series.batch(self.done)

    def add(self, fresh: ContrastStats, batches: int = 1) -> None:
        """Take the statistics of the next batches."""
        self.stats = self._keeper.added(self.stats, fresh)
        self.done += batches
        self._keeper.keep(self.stats, self.done)
        self._look()

    def take(self, shards: Shards, note: Callable[[str], None]) -> bool:
        """Take the next batches from what several workers have answered, unless these are enough; whether it did."""
        found = None if self.settled else shards.starting(self.done, self.series.batches, note)
        if found is not None:
            self.add(found[1], found[0].batches)
        return found is not None


class _Keeper:
    """Saves statistics after each batch, or so seldom that it takes a twentieth of the time, and at the end anyway.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._cost, self._saved = path, 0.0, time.monotonic()
        self._left: tuple[ContrastStats, int] | None = None

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self._save()

    def added(self, stats: ContrastStats, fresh: ContrastStats) -> ContrastStats:
        """The sum, in the memory of the first, which is no longer to be saved: a stop may come in between.

        Nothing else should refer to what is added: of a large model there is no room for it beside the next one.
        """
        self._left = None
        return stats.absorb(fresh)

    def keep(self, stats: ContrastStats, batches: int) -> None:
        """Take the statistics of so many first batches."""
        self._left = stats, batches
        if self._cost < _CHEAP or time.monotonic() - self._saved > self._cost / _SHARE:
            self._save()

    def _save(self) -> None:
        left, self._left = self._left, None
        if left is None or self._path is None:
            return
        began = time.monotonic()
        save_state(self._path, *left)
        self._saved = time.monotonic()
        self._cost = self._saved - began


def _origin(counted: _Counted) -> dict[str, Any]:
    return {
        "recipe": json.loads(counted.series.recipe.to_json()),
        "bench": counted.series.bench.digest,
        "questions": counted.asked,
        "questions_available": counted.total,
        "expected_overlap": round(counted.overlap, 4),
    }


def state_path(cache: Path, bench: TraitBench, key: str) -> Path:
    """Where the statistics of a trait's first batches are kept."""
    return cache / "identify" / f"{bench.trait}-{key}.safetensors"


def shards_beside(state: Path) -> Path:
    """Folder of what several workers have answered that is not in ``state`` yet."""
    return state.with_suffix(".shards")


def stopped(asked: int, total: int, overlap: float) -> str:
    """What the user is told where not every question was asked."""
    return (
        f"stopped after {asked} of {total} questions: the neurons selected now should overlap by {overlap:.0%} with "
        "those from all (--until all asks the rest)"
    )


def overlap_so_far(stats: ContrastStats, recipe: Recipe, asked: int, total: int) -> float:
    """What is compared with the goal after each batch: 0 as long as asking goes on in any case, 1 at the end."""
    if asked >= total:
        return 1.0
    if recipe.identify.until == "all" or asked < recipe.identify.floor:
        return 0.0
    if min(stats.plus.tokens, stats.minus.tokens) == 0:
        return 0.0
    return expected_overlap(stats, recipe.select, total)


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
        runtime.encode(message(recipe.prompt.system.replace("{persona}", persona.text), question.text, recipe))
        for question, persona in zip(questions, personas, strict=True)
    ]


def message(system: str | None, question: str, recipe: Recipe) -> list[Message]:
    """A one-turn chat with a question in the recipe's words."""
    return chat(system, recipe.prompt.user.replace("{question}", question))


def plain_prompts(runtime: Runtime, questions: Sequence[Question], recipe: Recipe) -> list[tuple[int, ...]]:
    """The questions with no persona: what the user of a steered model sends."""
    return [runtime.encode(message(None, question.text, recipe)) for question in questions]


def answer(
    runtime: Runtime, asked: Sequence[tuple[int, ...]], recipe: Recipe, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Greedy answers in the recipe's batches, token ids."""
    answers: list[tuple[int, ...]] = []
    for start in range(0, len(asked), recipe.identify.batch_size):
        exchanges = runtime.generate(
            asked[start : start + recipe.identify.batch_size],
            max_new_tokens=max_new_tokens,
            repetition_penalty=recipe.identify.repetition_penalty,
        )
        answers += [exchange.response for exchange in exchanges]
    return answers


def run_batch(
    runtime: Runtime, bench: TraitBench, batch: Sequence[Question], first: int, recipe: Recipe
) -> ContrastStats:
    """Ask some questions of both poles; ``first`` is the index of the first one in the whole series."""
    prompts = [prompt for sign in SIGNS for prompt in contrast_prompts(runtime, bench, batch, sign, recipe, first)]
    # The same personas with another question: what is common comes again with every question that they get.
    other = [Question("search", "0")] * len(batch)
    twins = [prompt for sign in SIGNS for prompt in contrast_prompts(runtime, bench, other, sign, recipe, first)]
    (plus, minus), answers = runtime.observe(
        prompts,
        [0] * len(batch) + [1] * len(batch),
        max_new_tokens=recipe.identify.max_new_tokens,
        repetition_penalty=recipe.identify.repetition_penalty,
        shared=[_common(prompt, twin) for prompt, twin in zip(prompts, twins, strict=True)],
    )
    spread = PairSpread.of_answers(answers[: len(batch)], answers[len(batch) :])
    return ContrastStats(plus, minus, spread)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two prompts share."""
    different = (index for index, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(different, min(len(left), len(right)))


def cache_key(source: ModelSource, bench: TraitBench, recipe: Recipe, dtype: str, device: str) -> str:
    """A short name of everything that statistics, and what else is made of a model's answers, depend on."""
    place: list[Any] = [source.digest] if source.digest else _place(source)
    depends: dict[str, Any] = {
        "format": _CACHE_FORMAT,
        "model": [source.fingerprint, *place],
        "bench": bench.digest,
        "prompt": recipe.prompt.model_dump(),
        "identify": recipe.identify.model_dump(exclude={"until", "overlap", "floor", "matched_questions"}),
        "dtype": dtype,
        "device": device,
        "runtime": _versions(dtype),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def _versions(dtype: str) -> list[str]:
    """Of what computes: another version may round otherwise, and batches of two make no one series."""
    from importlib.metadata import version

    runtime = ["llama-cpp-python"] if dtype.startswith("ggml") else ["torch", "transformers"]
    return [version(name) for name in (*runtime, "numpy")]


def _place(source: ModelSource) -> list[Any]:
    # A directory's files are what a model is made of; a changed one, weights or chat template, is another model.
    files = list(source.shards or [source.path])
    if source.path.is_dir():
        files = sorted(path for path in source.path.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [str(source.path.resolve()), stats]


def resume(state: Path | None, source: ModelSource, progress: Progress) -> tuple[ContrastStats, int]:
    """The statistics that :func:`save_state` kept and the batches that they are of; nothing where they are damaged."""
    fresh = ContrastStats.empty(source.shape.layers, source.shape.width)
    if state is None or not state.is_file():
        return fresh, 0
    try:
        saved, record = load_stats(state)
        done = record["batches"]
        if record["of"] != state.stem:
            raise ProfileError("of other questions")
        shapes = {one.active.shape for one in (saved.plus, saved.minus)}
        if type(done) is not int or done < 0 or shapes != {fresh.plus.active.shape}:
            raise ProfileError("of another shape")
    except (ProfileError, KeyError, TypeError):
        progress.note(f"{state}: damaged, starting this identification afresh")
        return fresh, 0
    progress.note(f"going on from {done} finished batches ({state})")
    return saved, done


def save_state(state: Path, stats: ContrastStats, batches: int) -> bool:
    """Keep the statistics of so many first batches, unless another job has kept those of more; whether it did."""
    with alone(state):
        if _claimed(state) > batches:
            with suppress(ProfileError):  # damaged
                load_stats(state)
                return False
        save_stats(state, stats, {"batches": batches, "of": state.stem})
    return True


def _claimed(state: Path) -> int:
    """Of how many batches a kept state says to be."""
    try:
        return int(peek_record(state)["progress"]["batches"])
    except (DamagedError, KeyError, TypeError, ValueError):
        return 0
