"""One process goes on from what the workers of a cluster finished, and asks only what is missing."""

import pytest
from test_distribute import assert_counts_equal

from npti_export.bench import load_bench
from npti_export.distribute.plan import Series
from npti_export.errors import ProfileError
from npti_export.identify.batches import Batches
from npti_export.identify.collect import cache_key, collect, run_batch, state_path
from npti_export.identify.profiles import Place, anything_kept
from npti_export.identify.shards import Node, Shards
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.stats import load_stats

QUICK = ["identify.questions=39", "identify.batch_size=4", "identify.until=all", "identify.max_new_tokens=8"]
BATCHES = 20


class Job:
    """A series of 20 batches on a tiny model, and what one process without a cache counts."""

    def __init__(self, path, cache):
        self.source, self.bench, self.cache = gguf_source(path), load_bench("openness"), cache
        self.recipe = load_recipe("npti", QUICK)
        self.runtime = LlamaCppRuntime(path, Settings(threads=1), sequences=4, source=self.source)
        series = Batches(self.bench, self.recipe)
        self.parts = [
            run_batch(self.runtime, self.bench, series.batch(at), series.asked(at), self.recipe)
            for at in range(series.batches)
        ]
        self.asked, self.loads, self.notes = [], 0, []
        key = cache_key(self.source, self.bench, self.recipe, "ggml-q4_1", "cpu")
        self.state = state_path(cache, self.bench, key)
        self.shards = Shards(Series(self.bench, self.recipe, self.state).shards)
        self.names = {}

    def write(self, *indices):
        for index in indices:
            node = Node(0, index)
            self.names[node] = self.shards.write(node, self.shards.encode(node, self.parts[index]))

    def load(self):
        self.loads += 1
        return self

    def encode(self, messages):
        return self.runtime.encode(messages)

    def observe(self, prompts, groups, **options):
        self.asked.append(len(prompts) // 2)
        return self.runtime.observe(prompts, groups, **options)

    def collect(self, *overrides):
        progress = Silent()
        progress.note = self.notes.append
        recipe = load_recipe("npti", [*QUICK, *overrides])
        return collect(
            self.load, self.source, self.bench, recipe, progress, dtype="ggml-q4_1", device="cpu", cache=self.cache
        )


@pytest.fixture
def job(make_tiny, tmp_path):
    found = Job(make_tiny("Q4_1"), tmp_path)
    yield found
    found.runtime.close()


def whole(job):
    return sum(job.parts[1:], job.parts[0])


def test_what_workers_finished_is_taken_and_only_the_rest_is_asked(job):
    job.write(*range(10), 12, 13, 19)
    job.shards.merge(Node(1, 0), job.names)
    stats, origin = job.collect()
    assert job.asked == [2] * 7  # 10, 11 and 14 to 18
    assert job.loads == 1
    assert any("10 batches are there that several workers answered" in note for note in job.notes)
    assert origin["questions"] == 39
    assert_counts_equal(stats, whole(job))
    assert not job.shards.folder.exists()
    kept, record = load_stats(job.state)
    assert record == {"batches": BATCHES, "of": job.state.stem}
    assert_counts_equal(kept, whole(job))


def test_where_workers_finished_all_the_model_is_not_loaded(job):
    job.write(*range(BATCHES))
    stats, _ = job.collect()
    assert (job.loads, job.asked) == (0, [])
    assert_counts_equal(stats, whole(job))


def test_a_damaged_shard_is_asked_again(job):
    job.write(0, 1, 2)
    (path,) = job.shards.folder.glob("0-1.*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    stats, _ = job.collect()
    assert len(job.asked) == BATCHES - 2
    assert any("shard 1 is damaged" in note for note in job.notes)
    assert_counts_equal(stats, whole(job))


def test_children_that_a_kill_left_beside_their_sum_count_once(job):
    job.write(*range(8))
    children = [(path, path.read_bytes()) for path in job.shards.folder.iterdir()]
    job.shards.merge(Node(1, 0), job.names)
    for path, data in children:
        path.write_bytes(data)
    stats, _ = job.collect()
    assert len(job.asked) == BATCHES - 8
    assert_counts_equal(stats, whole(job))
    assert not job.shards.folder.exists()


def test_what_is_beyond_the_end_stays_for_a_run_that_asks_more(job):
    job.write(0, 1, 2, 5)
    early = ["identify.until=stable", "identify.floor=6", "identify.overlap=0.0001"]
    stats, origin = job.collect(*early)
    assert (job.loads, origin["questions"]) == (0, 6)
    assert_counts_equal(stats, sum(job.parts[1:3], job.parts[0]))
    assert job.shards.found() == {Node(0, 5)}
    stats, _ = job.collect()
    assert len(job.asked) == BATCHES - 4
    assert_counts_equal(stats, whole(job))


def test_resume_finds_shards(job):
    place = Place(job.load, job.source, "ggml-q4_1", "cpu", job.cache)
    assert not anything_kept(place, job.bench, ("+",), job.recipe, None)
    job.write(3)
    assert anything_kept(place, job.bench, ("+",), job.recipe, None)


def test_a_shard_that_vanishes_while_it_is_read_is_asked(job, monkeypatch):
    """Another job with the same key may merge it meanwhile."""
    job.write(0)

    def gone(self, path, node):
        self.discard(node)
        raise ProfileError("missing")

    monkeypatch.setattr(Shards, "_load", gone)
    stats, _ = job.collect()
    assert len(job.asked) == BATCHES
    assert_counts_equal(stats, whole(job))
