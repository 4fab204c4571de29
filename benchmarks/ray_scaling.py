"""Identification on Ray against one process with the same threads, on the default model; both save what they have.

    python benchmarks/ray_scaling.py [--workers 2] [--questions 128] [--tokens 64] [--pairs 3]

Every core is one worker's, and one process gets as many threads as there are workers. Both take turns and load the
model each time; Ray itself is running already, and what its start takes is printed by itself. Ratios are medians of the
pairs'. "Answering" leaves out each worker's first batch, for which it loads the model, and the first of one process.

Overhead of shards: of all workers, what passes from the end of the first batch to that of the last one beyond the
seconds in which models answered, as a share of these; so with sums of shards (one for eight batches) and with waiting.
What comes after the last batch is given apart, in seconds: sums that are still under way, and the driver's merging of
all into the file that one process would have written.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from npti_export.bench import load_bench
from npti_export.distribute.cluster import connected
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Distribution
from npti_export.distribute.spread import Request, answered
from npti_export.identify.profiles import Place, identified
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import resolve_model
from npti_export.progress import Silent
from npti_export.recipe import select_recipe

TRAIT = "extraversion"


class Clock(Silent):
    """When each batch was answered, and of how many tokens."""

    def __init__(self):
        self.seen = []

    def advance(self, _steps, tokens=0):
        if tokens:
            self.seen.append((time.monotonic(), tokens))


def models_of(source, recipe, threads):
    size = recipe.identify.batch_size
    settings = RuntimeSettings(threads=threads)
    return Models(source, settings, Timings(), Silent(), verifies=False, sequences=size)


def by_one_process(source, recipe, threads, cache):
    """Seconds of the whole, and tokens a second from the first batch's end on."""
    clock, started = Clock(), time.monotonic()
    with models_of(source, recipe, threads) as models:
        place = Place(models.fast, source, models.dtype(), models.device(), cache)
        identified(place, load_bench(TRAIT), recipe, clock)
    whole = time.monotonic() - started
    (first, _), *rest = clock.seen
    return whole, sum(tokens for _, tokens in rest) / (rest[-1][0] - first)


def by_workers(source, recipe, workers, cache):
    """The same, of workers with a thread each, and a :class:`Shares` of what else there was."""
    started, bench = time.monotonic(), load_bench(TRAIT)
    models = models_of(source, recipe, 1)
    place = Place(models.fast, source, models.dtype(), models.device(), cache)
    request = Request({TRAIT: bench}, {TRAIT: recipe}, {}, recipe, None)
    with (
        clocked_finish() as finishes,
        answered(request, Distribution(workers), place, models, Silent()) as (place, log),
    ):
        identified(place, bench, recipe, Silent())
    whole = time.monotonic() - started
    by_worker = {}
    for one in log.asked:
        by_worker.setdefault(one.worker, []).append(one)
    if len(by_worker) < workers or min(map(len, by_worker.values())) < 3:
        sys.exit("a worker answered fewer than three batches, of which the first is left out; give more --questions")
    pace = answering = between = 0.0
    for some in by_worker.values():
        seconds = some[-1].arrived - some[0].arrived
        pace += sum(one.tokens for one in some[1:]) / seconds
        computing = sum(one.computing for one in some[1:])
        answering += computing
        between += seconds - computing
    ((began, ended),) = finishes
    waited = began - max(one.arrived for one in log.asked)
    return whole, pace, Shares(answering, between, log.merged, waited, ended - began)


@dataclass(frozen=True)
class Shares:
    """Seconds.

    Attributes:
        answering: of all workers, but for each one's first batch.
        between: what else passed until each one's last batch.
        merged: sums of shards made on the way.
        waited: from the last batch until the driver merged.
        finish: what its merging took.
    """

    answering: float
    between: float
    merged: int
    waited: float
    finish: float


@contextmanager
def clocked_finish():
    """When the driver's merging began and ended, each time."""
    plain, seen = Gathering.finish, []

    def finish(self):
        began = time.monotonic()
        plain(self)
        seen.append((began, time.monotonic()))

    Gathering.finish = finish
    try:
        yield seen
    finally:
        Gathering.finish = plain


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    source = resolve_model(None)
    overrides = [f"identify.questions={arguments.questions}", f"identify.max_new_tokens={arguments.tokens}"]
    recipe = select_recipe(None, source.fingerprint, [*overrides, "identify.until=all"], neurons=True)
    started, found, shares = time.monotonic(), [], []
    with connected(Distribution(arguments.workers), arguments.workers):
        print(f"Ray started in {time.monotonic() - started:.1f} s", flush=True)
        for _ in range(arguments.pairs):
            with tempfile.TemporaryDirectory() as folder:
                alone, pace = by_one_process(source, recipe, arguments.workers, Path(folder, "alone"))
                whole, others, share = by_workers(source, recipe, arguments.workers, Path(folder, "ray"))
            shares.append(share)
            found.append((others / pace, alone / whole))
            print(
                f"  one process {alone:.1f} s, {pace:.0f} tokens/s; {arguments.workers} workers {whole:.1f} s, "
                f"{others:.0f} tokens/s",
                flush=True,
            )
    answering, everything = (statistics.median(one) for one in zip(*found, strict=True))
    print(f"answering: {answering:.2f}x the tokens per second of one process with {arguments.workers} threads")
    print(f"everything, loading included: {everything:.2f}x")
    computing, between = sum(one.answering for one in shares), sum(one.between for one in shares)
    print(f"overhead of shards: {between:.1f} s over {computing:.0f} s of answering, {between / computing:.1%}")
    rest = ", ".join(f"{one.merged} sums on the way, {one.waited:.1f} + {one.finish:.1f} s" for one in shares)
    print(f"behind the last batch, until merging and merging: {rest}")


if __name__ == "__main__":
    main()
