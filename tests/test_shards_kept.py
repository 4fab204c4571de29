"""What is kept of a series of batches: whose it is, who may replace it, and folders that are shown late."""

import errno
import os
import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from test_distribute import assert_counts_equal, outcome, random_stats

from npti_export.bench import load_bench
from npti_export.checked import peek_record, save_checked
from npti_export.distribute import gathering as gathering_module
from npti_export.distribute import spread
from npti_export.distribute.gathering import Gathering
from npti_export.distribute.plan import Series
from npti_export.errors import ClusterError, DamagedError, OutputError, ProfileError
from npti_export.identify import shards as shards_module
from npti_export.identify.collect import resume, save_state, state_path
from npti_export.identify.profiles import Place
from npti_export.identify.shards import Node, Shards
from npti_export.locks import alone
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.temporaries import temporary_beside

fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def source(tiny):
    return gguf_source(tiny)


@pytest.fixture
def series(tmp_path):
    recipe = load_recipe("npti", ["identify.questions=39", "identify.batch_size=4", "identify.until=all"])
    return Series(load_bench("openness"), recipe, tmp_path / "identify" / "openness-key.safetensors")


@pytest.fixture
def parts(source):
    return [random_stats(source.shape, seed) for seed in range(20)]


def told():
    progress = Silent()
    progress.notes = []
    progress.note = progress.notes.append
    return progress


def begun(series, source, parts, indices):
    found = Gathering(series, source, Silent())
    for index in indices:
        found.answered(index, outcome(found, index, parts[index]))
    return found


def test_a_shard_says_of_which_questions_it_is(series, source, parts):
    """A copy under another name, or of another trait, has a good checksum."""
    first = begun(series, source, parts, (5,))
    (path,) = series.shards.iterdir()
    shutil.copy(path, path.with_name(path.name.replace("0-5", "0-6")))
    other = replace(series, state=series.state.with_name("extraversion-key.safetensors"))
    other.shards.mkdir()
    shutil.copy(path, other.shards / path.name)
    assert first.shards.found() == {Node(0, 5), Node(0, 6)}
    progress = told()
    again = Gathering(series, source, progress)
    assert set(again.held) == {Node(0, 5)}
    assert "shard 6 is damaged" in progress.notes[0]
    assert Gathering(other, source, progress).held == {}


def test_a_state_says_of_which_questions_it_is(series, source, parts):
    save_state(series.state, parts[0], 1)
    other = series.state.with_name("extraversion-key.safetensors")
    shutil.copy(series.state, other)
    assert resume(series.state, source, Silent())[1] == 1
    progress = told()
    assert resume(other, source, progress)[1] == 0
    assert "damaged" in progress.notes[0]


def test_a_state_never_goes_back(series, source, parts):
    """Of two jobs with the same questions, the one that is behind must not replace what the other kept."""
    assert save_state(series.state, sum(parts[1:5], parts[0]), 5)
    kept = series.state.read_bytes()
    assert not save_state(series.state, parts[0], 1)
    assert series.state.read_bytes() == kept
    assert save_state(series.state, sum(parts[1:5], parts[0]), 5)
    series.state.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))  # damaged: what it claims does not count
    assert save_state(series.state, parts[0], 1)
    assert resume(series.state, source, Silent())[1] == 1


def test_what_a_file_claims_is_read_without_its_arrays(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checked(path, {"a": np.zeros(1 << 20)}, {"progress": {"batches": 7}})
    path.write_bytes(path.read_bytes()[:2000])
    assert peek_record(path) == {"progress": {"batches": 7}}
    for data in (b"", b"\xff" * 100, (4).to_bytes(8, "little") + b"[[]]"):
        path.write_bytes(data)
        with pytest.raises(DamagedError):
            peek_record(path)


def test_a_gathering_that_is_overtaken_takes_what_the_other_kept(series, source, parts):
    """Between its look at the state and its own writing of it."""
    found = begun(series, source, parts, range(20))
    total = found.shards.total

    def meanwhile(node, names):
        save_state(series.state, sum(parts[1:], parts[0]), 20)
        found.shards.total = total
        return total(node, names)

    found.shards.total = meanwhile
    found.finish()
    found.finish()
    assert found.finished
    assert_counts_equal(resume(series.state, source, Silent())[0], sum(parts[1:], parts[0]))
    assert not series.shards.exists()


def test_shards_are_summed_before_the_folder_lists_them(series, source, parts, monkeypatch):
    """A shared folder may show what another machine wrote by its name at once, and in a list half a minute later."""
    found = begun(series, source, parts, range(8))
    monkeypatch.setattr(Shards, "_paths", lambda _self, _node: [])
    (node,) = found.merges(())
    found.merge(node)
    assert set(found.held) == {Node(1, 0)}
    assert_counts_equal(found.shards.read(node, found.held[node]), sum(parts[1:8], parts[0]))


def test_a_file_that_is_shown_late_is_waited_for(series, source, parts, monkeypatch):
    monkeypatch.setattr(shards_module, "_POLL", 0.05)
    monkeypatch.setattr(shards_module, "_LATE", 200)
    found = begun(series, source, parts, (0,))
    path = series.shards / found.held[Node(0, 0)]
    hidden = path.rename(path.with_name("hidden"))
    waited = threading.Timer(0.3, hidden.rename, [path])
    waited.start()
    assert_counts_equal(found.shards.read(Node(0, 0), path.name), parts[0])
    waited.join()
    path.unlink()
    monkeypatch.setattr(shards_module, "_LATE", 2)
    with pytest.raises(ProfileError):
        found.shards.read(Node(0, 0), path.name)


def test_what_is_damaged_time_and_again_ends_the_job(series, source, parts, monkeypatch):
    monkeypatch.setattr(gathering_module, "_DAMAGES", 3)
    found = begun(series, source, parts, ())
    for _ in range(3):
        found.damaged()
    with pytest.raises(ClusterError, match="damaged or missing time and again; look after the disk"):
        found.damaged()


def test_the_late_copy_of_a_shard_is_removed_and_the_counted_one_stays(series, source, parts):
    found = begun(series, source, parts, (0,))
    node = Node(0, 0)
    other = found.shards.write(node, found.shards.encode(node, parts[1]))
    found.late(0, found.held[node])
    found.late(0, other)
    assert [path.name for path in series.shards.iterdir()] == [found.held[node]]


def test_what_a_killed_worker_left_is_swept_and_what_a_living_one_writes_stays(series, source, parts):
    found = begun(series, source, parts, (0,))
    dead = temporary_beside(series.shards / "0-1.x.safetensors", folder=False)
    alive = temporary_beside(series.shards / "0-2.x.safetensors", folder=False)
    os.close(dead.handle)
    found.shards.discard(Node(0, 0))
    found.shards.close()
    assert list(series.shards.iterdir()) == [alive.path]
    alive.remove()
    found.shards.close()
    assert not series.shards.exists()


def test_a_second_job_with_the_same_questions_waits_and_finds_the_answers(series, source, parts, monkeypatch):
    """Neither asks what the other asks, nor takes its shards away."""
    cache = series.state.parents[1]
    place = Place(None, source, "float32", "cpu", cache)
    request = spread.Request({"openness": series.bench}, {"openness": series.recipe}, {}, series.recipe, None)
    monkeypatch.setattr(spread, "cache_key", lambda *_: "key")
    assert state_path(cache, series.bench, "key") == series.state
    progress, events = told(), []

    def second():
        with ExitStack() as stack:
            plan = spread._own_plan(request, place, progress, stack)
            plan.finish()
            events.append(("left", plan.left))

    with alone(series.state.with_suffix(".shards")) as waited:
        assert not waited
        thread = threading.Thread(target=second)
        thread.start()
        while not progress.notes:
            time.sleep(0.01)
        assert "waiting for another job" in progress.notes[0]
        first = begun(series, source, parts, range(20))
        first.finish()
        events.append("finished")
    thread.join()
    assert events == ["finished", ("left", False)]


def test_a_file_system_without_locks_keeps_all_the_same(series, parts, source, monkeypatch):
    def none(_handle, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert save_state(series.state, parts[0], 1)
    monkeypatch.undo()
    assert resume(series.state, source, Silent())[1] == 1


def test_a_lock_that_may_not_be_made_is_said(tmp_path, monkeypatch):
    def refused(_handle, _how):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OutputError, match="openness"), alone(tmp_path / "openness.safetensors"):
        pass
