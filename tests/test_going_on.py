"""The same command again after a stop: what it wrote before its end is no reason to refuse, and is not replaced."""

import json
from dataclasses import replace

import numpy as np
import pytest
from jobs import QUICK, main_job, npti

from npti_export.endings.gguf import GGUFEnding
from npti_export.errors import OutputError
from npti_export.profile import NeuronProfile, read_profile, write_profile
from npti_export.profile_io import save_profile


@pytest.fixture
def run(cli_environment, tmp_path):
    return lambda *arguments: npti(*arguments, environment=cli_environment, cwd=tmp_path)


def stopped_at_the_bake(run, job, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GGUFEnding, "compile", stop)
        done = run(*job)
    assert done.returncode == 130, done.stderr
    assert "the same command goes on" in done.stderr


@pytest.mark.parametrize("names", [["p.safetensors"], ["Extraversion_dict.json", "Extraversion_reversed_dict.json"]])
def test_a_job_that_was_stopped_after_its_profile(run, tiny, tmp_path, monkeypatch, names):
    job = main_job(tiny, "m.gguf", "--save-profile", names[0])
    stopped_at_the_bake(run, job, monkeypatch)
    paths = [tmp_path / name for name in names]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in paths]
    if len(paths) > 1:
        paths[1].unlink()  # as between the files of a pair
    done = run(*job)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.gguf").is_file()
    assert [path.read_bytes() for path in paths] == [data for *_, data in before]
    assert (paths[0].stat().st_ino, paths[0].stat().st_mtime_ns) == before[0][:2]


def test_another_profile_is_refused_before_any_work(run, tiny, tmp_path):
    job = ["identify", "--trait", "extraversion", "--model", tiny, *QUICK]
    assert run(*job, "--out", "p.safetensors").returncode == 0
    path = tmp_path / "p.safetensors"
    before = path.read_bytes()
    for more in (["--questions", "5"], ["--set", "identify.seed=3"], ["--trait", "openness"]):
        one = [*job, *more] if more[0] != "--trait" else ["identify", *more, *job[3:]]
        done = run(*one, "--out", "p.safetensors")
        assert done.returncode == 2
        assert "p.safetensors: exists already, and is another profile; pass --force" in done.stderr
        assert "identify extraversion" not in done.stderr  # no stage began
        assert path.read_bytes() == before
    profile = read_profile(path)
    write_profile(replace(profile, origin=profile.origin | {"version": "0.0.1"}), path, force=True)
    done = run(*job, "--out", "p.safetensors")
    assert (done.returncode, "and is another profile; pass --force" in done.stderr) == (2, True)
    path.write_bytes(before[:-1])
    done = run(*job, "--out", "p.safetensors")
    assert (done.returncode, "p.safetensors: exists already; pass --force" in done.stderr) == (2, True)
    assert path.read_bytes() == before[:-1]


def test_a_profile_of_the_same_job_that_holds_something_else(run, tiny, tmp_path):
    """It is seen only when there is something to compare it with; it stays, and so do the others."""
    job = ["identify", "--trait", "extraversion", "--trait", "openness", "--model", tiny, *QUICK, "--out", "profiles"]
    assert run(*job).returncode == 0
    folder = tmp_path / "profiles"
    one, other = folder / "extraversion.safetensors", folder / "openness.safetensors"
    whole = [one.read_bytes(), other.read_bytes()]
    one.unlink()
    inode = other.stat().st_ino
    done = run(*job)
    assert done.returncode == 0, done.stderr
    assert [one.read_bytes(), other.read_bytes()] == whole
    assert other.stat().st_ino == inode
    one.unlink()
    profile = read_profile(other)
    profile.p_plus[0, 0] = 0.25
    write_profile(profile, other, force=True)
    changed = other.read_bytes()
    done = run(*job)
    assert done.returncode == 2
    assert "openness.safetensors: exists already, and is another profile than the one found now" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["openness.safetensors"]  # all or none
    assert other.read_bytes() == changed
    done = run(*job, "--force")
    assert done.returncode == 0, done.stderr
    assert [one.read_bytes(), other.read_bytes()] == whole


def test_a_given_profile_is_compared_before_any_work(run, tiny, tmp_path):
    assert run("identify", "--trait", "extraversion", "--model", tiny, *QUICK, "--out", "p.safetensors").returncode == 0
    job = main_job(tiny, "m.gguf", "--profile", "p.safetensors", "--save-profile", "q.safetensors")
    assert run(*job).returncode == 0
    (tmp_path / "m.gguf").unlink()
    profile = read_profile(tmp_path / "q.safetensors")
    profile.p_plus[0, 0] = 0.25
    write_profile(profile, tmp_path / "q.safetensors", force=True)
    done = run(*job)
    assert done.returncode == 2
    assert "q.safetensors: exists already, and is another profile than the one found now" in done.stderr
    assert "load" not in done.stderr


def test_of_a_published_pair_both_are_written_or_neither(tmp_path):
    arrays = [np.array([[a, b]], np.float32) for a, b in ((0.9, 0.1), (0.1, 0.9), (1, 1), (1, 1))]
    profile = NeuronProfile("extraversion", *arrays, None)
    plus, minus = save_profile(profile, tmp_path / "Extraversion_dict.json", force=False)
    save_profile(profile, plus, force=False)
    plus.unlink()
    minus.write_text(json.dumps({"0": [[0, 1, 0.5, 0.9, 1.0]]}))
    with pytest.raises(OutputError, match=r"reversed_dict\.json: exists already, and is another profile"):
        save_profile(profile, plus, force=False)
    assert list(tmp_path.iterdir()) == [minus]
