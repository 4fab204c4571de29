"""How often what was counted is saved while questions are asked."""

import pytest
from jobs import QUICK, npti

from npti_export.identify import collect


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Adding:
    """Statistics whose sum is told by its name, or that are interrupted as they are added to."""

    def __init__(self, error):
        self.error = error

    def absorb(self, done):
        if self.error is not None:
            raise self.error
        return f"of {done}"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(cost, batches, seconds a batch) -> batches that were saved, in order; ``stop`` interrupts while adding."""
    clock, saved = Clock(), []

    def save(_path, stats, batches):
        assert stats == f"of {batches}"
        clock.now += save.cost
        saved.append(batches)

    monkeypatch.setattr(collect, "time", clock)
    monkeypatch.setattr(collect, "save_state", save)

    def ask(cost, batches, seconds, *, stop=None, error=KeyboardInterrupt):
        save.cost = cost
        saved.clear()
        with collect._Keeper(tmp_path / "state") as keeper:
            for done in range(1, batches + 1):
                clock.now += seconds
                if stop == done - 0.5:
                    raise error
                if stop == done:
                    keeper.added(Adding(error), None)
                keeper.keep(keeper.added(Adding(None), done), done)
        return list(saved)

    return ask, saved


def test_what_is_quickly_written_is_written_each_time(run):
    assert run[0](0.1, 5, 0.01) == [1, 2, 3, 4, 5]


def test_what_takes_long_takes_a_twentieth_of_the_time_and_is_whole_in_the_end(run):
    ask, _ = run
    assert ask(1.0, 47, 2.0) == [1, 12, 23, 34, 45, 47]  # more than 20 seconds apart
    assert ask(1.0, 45, 2.0) == [1, 12, 23, 34, 45]  # once


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_stop_saves_what_is_whole_and_nothing_that_is_being_added_to(run, error):
    ask, saved = run
    for stop, want in ((9.5, [1, 9]), (9, [1])):
        with pytest.raises(error):
            ask(1.0, 20, 2.0, stop=stop, error=error)
        assert saved == want


def test_without_a_cache_nothing_is_written(monkeypatch):
    monkeypatch.setattr(collect, "save_state", None)
    with collect._Keeper(None) as keeper:
        keeper.keep("stats", 1)


def test_resume_goes_on_and_never_begins(tiny, cli_environment, tmp_path):
    """Where one option differs it is another job, of which nothing is kept: that must not cost a night in silence."""
    job = ["identify", "--trait", "openness", "--model", tiny, "--recipe", "npti", *QUICK[:6], "--out"]

    def run(*arguments):
        return npti(*arguments, environment=cli_environment, cwd=tmp_path)

    done = run(*job, "a", "--resume", "--max-new-tokens", "7")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--resume: of this very job nothing is kept in" in done.stderr
    assert run(*job, "a", "--max-new-tokens", "7").returncode == 0
    assert run(*job, "b", "--resume", "--max-new-tokens", "7").returncode == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert run(*job, "c", "--resume", "--max-new-tokens", "6").returncode == 2
    assert not (tmp_path / "c").exists()
    done = run(*job, "c", "--resume", "--no-cache")
    assert (done.returncode, "--no-cache does not keep" in done.stderr) == (2, True)
