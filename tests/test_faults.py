"""Kills, full disks and damaged caches: nothing half-written, and the work goes on."""

import errno
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import COMMAND, main_job, npti, npti_process


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("allowed", [50_000, 400_000])
def test_a_disk_that_fills_up(finished, tiny, cli_environment, tmp_path, allowed):
    """Real failing writes, at two places of the file: the process may not write files over a size."""
    import resource

    folder, _ = finished
    done = npti_process(
        *main_job(tiny, "m.gguf", "--profile", folder / "p.safetensors"),
        environment=cli_environment,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed)),
    )
    assert done.returncode == 4, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_no_room_for_temporary_files(tiny, cli_environment, tmp_path, monkeypatch):
    """A steered file that tune makes for a trial."""
    from npti_export.export import gguf

    def full(_plan, _path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf, "write_bake", full)
    few = ["--trials", "1", "--questions", "2", "--test-questions", "1", "--answer-tokens", "4", "--personas", "1"]
    few += ["--recipe", "npti", "--set", "identify.questions=4", "--set", "identify.max_new_tokens=4"]
    job = ["tune", "--trait", "extraversion+", "--model", tiny, "--threads", "1", "--weights", "file", *few]
    done = npti(*job, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert re.search(r"steered\.gguf: the disk is full", done.stderr.replace("\n", " "))


def test_an_error_that_nobody_expected_says_whether_the_disk_is_full(capsys, monkeypatch):
    from npti_export import cli
    from npti_export.cli.root import cli as root

    for number, code, more in ((errno.ENOSPC, 4, "; make room, also where"), (errno.EIO, 2, "")):

        def fails(number=number, **_):
            raise OSError(number, "said", "a.bin")

        monkeypatch.setattr(root, "main", fails)
        with pytest.raises(SystemExit) as ended:
            cli.main([])
        said = capsys.readouterr().err
        assert ended.value.code == code
        assert f"npti-export: a.bin: said{more}" in said


def wait_for_batches(cache, process, count=1, timeout=120):
    """Until a state file has been written ``count`` times."""
    seen, last = 0, None
    limit = time.monotonic() + timeout
    while seen < count and process.poll() is None and time.monotonic() < limit:
        for path in Path(cache).glob("identify/*.safetensors"):
            stamp = path.stat().st_mtime_ns
            if stamp != last:
                seen, last = seen + 1, stamp
        time.sleep(0.005)
    assert seen >= count, "the run ended before it could be killed"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_goes_on_where_it_stopped_and_gives_the_same_bytes(finished, tiny, cli_environment, tmp_path, how):
    folder, _ = finished
    log = tmp_path / "cache" / "run.log"
    log.parent.mkdir()
    process = subprocess.Popen(
        [*COMMAND, *map(str, main_job(tiny, "model.gguf", "--log", log))],
        env=cli_environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_batches(cli_environment["NPTI_CACHE"], process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=180)
    assert not (tmp_path / "model.gguf").exists()
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert "interrupted" in errors.splitlines()[-1]
        assert {path.name for path in tmp_path.iterdir()} == {"cache"}
        assert log.read_text().endswith("and the same command goes on from the last finished batch\n")
    done = npti(*main_job(tiny, "model.gguf"), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert (tmp_path / "model.gguf").read_bytes() == (folder / "model.gguf").read_bytes()


def half(data):
    return data[: len(data) // 2]


def one_bit_of_the_numbers(data):
    """In the last quarter, which is numbers only: as a file it stays whole."""
    place = len(data) - len(data) // 8
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", [half, one_bit_of_the_numbers])
def test_a_damaged_cache_is_not_believed(finished, tiny, cli_environment, tmp_path, damage):
    folder, _ = finished
    environment = {**cli_environment, "NPTI_CACHE": str(folder / "cache")}
    (state,) = (folder / "cache" / "identify").glob("*.safetensors")
    data = state.read_bytes()
    try:
        state.write_bytes(damage(data))
        done = npti(*main_job(tiny, "m.gguf"), environment=environment, cwd=tmp_path)
    finally:
        state.write_bytes(data)
    assert done.returncode == 0, done.stderr
    assert "starting this identification afresh" in done.stderr.replace("\n", " ")
    assert (tmp_path / "m.gguf").read_bytes() == (folder / "model.gguf").read_bytes()


@pytest.mark.parametrize("damage", [half, one_bit_of_the_numbers])
def test_a_damaged_constant_is_not_believed(tiny, cli_environment, tmp_path, damage):
    job = [*main_job(tiny, "m.gguf"), "--set", "rule.matched=0.5", "--set", "identify.matched_questions=2"]
    done = npti(*job, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "cache" / "matched").glob("*.safetensors")
    cached, whole = kept.read_bytes(), (tmp_path / "m.gguf").read_bytes()
    again = npti(*job, "--force", environment=cli_environment, cwd=tmp_path)
    assert "match" not in again.stderr  # taken from the cache
    kept.write_bytes(damage(cached))
    done = npti(*job, "--force", environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "damaged, matching afresh" in done.stderr.replace("\n", " ")
    assert kept.read_bytes() == cached
    assert (tmp_path / "m.gguf").read_bytes() == whole
