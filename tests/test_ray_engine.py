"""The driver's own doing, call by call, where a real Ray would have to die at the right moment (see test_ray.py)."""

from types import SimpleNamespace

import numpy as np
import pytest

from npti_export.bench import load_bench
from npti_export.distribute import ray_engine
from npti_export.distribute.cluster import Size
from npti_export.distribute.plan import Hello, Match, Outcome, Series
from npti_export.distribute.ray_engine import RayEngine
from npti_export.errors import ClusterError
from npti_export.identify.profiles import encode_constant
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe


class FakeRay:
    """As much of Ray as the driver uses: what each call ends with is said beforehand, and nothing runs at once."""

    exceptions = pytest.importorskip("ray").exceptions

    def __init__(self, answers):
        self.answers, self.calls = answers, []

    def remote(self, _kind):
        return self

    def options(self, **_options):
        return SimpleNamespace(remote=lambda _setup: _Actor(self))

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="")

    def put(self, value):
        return value

    def wait(self, refs, num_returns, timeout):
        return list(refs)[:1], list(refs)[1:]

    def kill(self, _actor, *, no_restart):
        assert not no_restart
        self.calls.append("kill")

    def get(self, ref):
        outcome = self.answers.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class _Actor:
    def __init__(self, ray):
        for name in ("hello", "run", "close"):
            setattr(self, name, SimpleNamespace(remote=lambda *_, name=name: self._call(ray, name)))

    def _call(self, ray, name):
        ray.calls.append(name)
        return (len(ray.calls), name)


def match_task(shape, tmp_path):
    """A constant to be found, which is one task; nothing identified."""
    series = Series(load_bench("openness"), load_recipe("npti"), tmp_path / "state.safetensors")
    constant = encode_constant(np.zeros((shape.layers, shape.width), np.float32))
    return series, Match("openness", "+", series.recipe, tmp_path / "constant"), Outcome("here:2", data=constant)


def driven(answers, series, match, told):
    ray = FakeRay(answers)
    with RayEngine(ray, None, Size(1, 1, 0), told) as engine:
        engine.run([series], [], [match])
        return ray.calls, engine.log


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def unavailable():
    return FakeRay.exceptions.ActorUnavailableError("being started again", None)


def test_a_worker_that_is_started_again_is_asked_before_it_gets_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_POLL", 0.01)
    series, match, done = match_task(gguf_source(tiny).shape, tmp_path)
    hello, again = Hello("here:1", "float32", "cpu"), Hello("here:2", "float32", "cpu")
    for lost in (
        unavailable(),
        FakeRay.exceptions.OutOfMemoryError("killed"),
        FakeRay.exceptions.ObjectLostError("a", "b", "c"),
    ):
        told = Told()
        calls, log = driven([hello, lost, unavailable(), unavailable(), again, done], series, match, told)
        assert calls[:6] == ["hello", "run", "hello", "hello", "hello", "run"]
        assert (log.restarted, log.lost) == (1, 0)
        assert [note for note in told.notes if "died" in note] == [
            "the worker here:1 died; Ray started it again as here:2"
        ]
        assert match.path.is_file()
        match.path.unlink()


def test_a_worker_that_stays_away_is_given_up(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_POLL", 0.001)
    monkeypatch.setattr(ray_engine, "_SILENT", 5)
    series, match, _ = match_task(gguf_source(tiny).shape, tmp_path)
    hello, told = Hello("here:1", "float32", "cpu"), Told()
    with pytest.raises(ClusterError, match="every worker died and did not come back"):
        driven([hello, unavailable(), *(unavailable() for _ in range(9))], series, match, told)
    dead = FakeRay.exceptions.ActorDiedError()
    with pytest.raises(ClusterError, match="every worker died"):
        driven([hello, dead], series, match, told)
    with pytest.raises(ClusterError, match="die at the same task time and again"):
        driven([hello, *[unavailable(), hello] * 6], series, match, told)


def test_a_task_that_raises_is_tried_in_a_fresh_worker_and_once_only(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_POLL", 0.01)
    series, match, done = match_task(gguf_source(tiny).shape, tmp_path)
    hello, again = Hello("here:1", "float32", "cpu"), Hello("here:2", "float32", "cpu")

    def broken():
        return FakeRay.exceptions.RayTaskError("run", "RuntimeError: CUDA error: uncorrectable ECC", RuntimeError("e"))

    told = Told()
    calls, log = driven([hello, broken(), again, done], series, match, told)
    assert calls[:5] == ["hello", "run", "kill", "hello", "run"]
    assert log.restarted == 1
    assert told.notes[0].startswith("the worker here:1 fails (RuntimeError: CUDA error: uncorrectable ECC)")
    with pytest.raises(ClusterError, match=r"fails in every worker \(RuntimeError: CUDA error: uncorrectable ECC\)"):
        driven([hello, broken(), again, broken()], series, match, told)
