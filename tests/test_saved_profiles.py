"""Profiles that a command saves: all or none, and a run that was stopped does not meet its own output."""

import errno
from pathlib import Path

import pytest
from jobs import QUICK, main_job, npti

from npti_export import pipeline

SAVED = ("--save-profile", "p.safetensors")


def npti_main(tiny, cli_environment, tmp_path, *more):
    return npti(*main_job(tiny, "m.gguf", *SAVED, *more), environment=cli_environment, cwd=tmp_path)


def outputs(folder):
    return {path.name for path in folder.iterdir()} - {"cache"}


def test_the_command_goes_on_after_a_stop_behind_identification(tiny, cli_environment, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "measure_artifact", stopped)
        done = npti_main(tiny, cli_environment, tmp_path)
    assert done.returncode == 130
    assert "the same command goes on" in done.stderr
    assert outputs(tmp_path) == {"p.safetensors"}
    done = npti_main(tiny, cli_environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path) == {"m.gguf", "p.safetensors"}


def test_a_file_that_is_not_faithful_costs_no_profile(tiny, cli_environment, tmp_path):
    done = npti_main(tiny, cli_environment, tmp_path, "--set", "verify.kl_limit_float=1e-12")
    assert done.returncode == 3, done.stderr
    assert outputs(tmp_path) == {"m.gguf.rejected", "p.safetensors"}


@pytest.mark.parametrize("exists", [False, True])
def test_several_profiles_are_all_there_or_none(tiny, cli_environment, tmp_path, monkeypatch, exists):
    job = ["identify", "--trait", "extraversion", "--trait", "openness", "--model", tiny, "--recipe", "npti", *QUICK]
    if exists:
        (tmp_path / "profiles").mkdir()
        (tmp_path / "profiles" / "mine.txt").write_text("mine")
    before, write, met = set(tmp_path.rglob("*")), Path.write_bytes, []

    def full(path, data):
        if path.name.startswith(".openness.safetensors."):
            met.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        done = npti(*job, "--out", "profiles", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert len(met) == 1
    cache = tmp_path / "cache"
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(cache)} == before
    done = npti(*job, "--out", "profiles", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"extraversion.safetensors", "openness.safetensors", *(["mine.txt"] if exists else [])}
    assert {path.name for path in (tmp_path / "profiles").iterdir()} == names
