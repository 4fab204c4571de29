"""Runs of hours: a log of what happened and how it ended, and a plain end where a file is cut short under them."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from jobs import main_job, npti

from npti_export.cli.long_runs import interrupted
from npti_export.generators.address import without_secrets

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \d+ "


def test_a_log_tells_what_happened(tiny, cli_environment, tmp_path):
    log = tmp_path / "run.log"
    done = npti(*main_job(tiny, "m.gguf", "--log", log), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert all(re.match(TIME, line) for line in lines)
    told = "\n".join(lines)
    assert re.search(r"npti-export \d+\.\d+\.\d+", lines[0])
    for stage in ("identify extraversion: begins, 6 to do", "identify extraversion: 6 of 6 in", "write: 1 of 1"):
        assert stage in told
    assert re.search(r"\d+ tokens", told)
    assert re.search(r"ended after \d+\.\d s: done$", lines[-1])
    # a second run is added, with its notes
    again = npti(*main_job(tiny, "m.gguf", "--log", log), environment=cli_environment, cwd=tmp_path)
    assert again.returncode == 2
    more = log.read_text().splitlines()
    assert more[: len(lines)] == lines
    assert "OutputError: m.gguf: exists already; pass --force" in more[-1]
    assert len(more) == len(lines) + 2


def test_notes_are_in_the_log(tiny, cli_environment, tmp_path):
    job = ["identify", "--trait", "extraversion", *main_job(tiny, "p.safetensors")[2:]]
    for name in ("one.log", "two.log"):
        done = npti(*job, "--force", "--log", name, environment=cli_environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "going on from" not in (tmp_path / "one.log").read_text()
    assert re.search(TIME + "going on from 3 finished batches", (tmp_path / "two.log").read_text())


@pytest.mark.parametrize("command", [["identify", "--trait", "extraversion"], ["tune", "--trait", "calm"], []])
def test_a_log_that_cannot_be_written(command, cli_environment, tmp_path):
    job = [*command, "--out", "m", "--log", tmp_path / "no" / "run.log"]
    done = npti(*job, environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "run.log: cannot be written" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_log_on_a_full_disk_does_not_end_the_job(tiny, cli_environment, tmp_path):
    done = npti(*main_job(tiny, "m.gguf", "--log", "/dev/full"), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the log breaks off") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_mapped_file_that_is_cut_short(tmp_path):
    """A read behind the new end of a mapped file is a bus error, in the middle of C code."""
    program = textwrap.dedent(
        """
        import os, sys
        import numpy as np
        from npti_export.cli.long_runs import end_plainly_on_lost_files
        end_plainly_on_lost_files()
        values = np.memmap(sys.argv[1], np.uint8, "r")
        os.truncate(sys.argv[1], 10)
        print(values.sum())
        """
    )
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("npti-export: a file that was being read became shorter")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


BATCH, ANEW = "goes on from the last finished batch", "begins anew, as --no-cache keeps nothing"
AGAIN = "takes up its identifications, and asks for answers again"


@pytest.mark.parametrize(
    ("command", "promised"),
    [
        ("--trait calm", BATCH), ("--trait calm --no-cache", ANEW), ("--out chat --trait calm", BATCH),
        ("--from calm/ --out b.gguf", None), ("identify --trait calm --out evaluate", BATCH),
        ("compile --trait calm", BATCH), ("compile --trait calm --no-cache", ANEW), ("dial --traits all", BATCH),
        ("dial request d/ calm", None), ("tune --trait calm", f"{BATCH} or trial"),
        ("tune --trait calm --no-cache", ANEW),
        ("tune --trait calm --no-cache --storage=s.db", "goes on from the last finished trial"),
        ("bench build d/ --out e", "goes on from the last answer"),
        ("bench build d/ --force", "without --force goes on from the last answer"), ("bench lint d/", None),
        ("evaluate m.gguf", AGAIN), ("evaluate m.gguf --no-cache", ANEW), ("ablate --trait calm", AGAIN),
        ("evaluate m.gguf --judge-journal v", AGAIN.replace(",", " and verdicts,")),
        ("evaluate m.gguf --judge-journal=v --no-cache", AGAIN.replace("identifications", "verdicts")),
        ("ablate --no-cache", ANEW), ("chat m.gguf", None), ("strip m.gguf --out b.gguf", None),
    ],
)  # fmt: skip
def test_what_is_promised_after_ctrl_c(command, promised):
    whole = "interrupted; nothing was half-written"
    assert interrupted(command.split()) == whole + (f", and the same command {promised}" if promised else "")


def test_a_log_is_never_added_to_another_file(tiny, cli_environment, tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    done = npti(*main_job(tiny, "m.gguf", "--log", "notes.txt"), environment=cli_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "notes.txt: is there already, and is no log of npti-export" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine\n"
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://user:key@example.org/v1=judge", "https://example.org/v1=judge"),
        ("--judge=https://example.org/v1?key=abc=judge", "--judge=https://example.org/v1=judge"),
        ("http://h/v1?key=abc&token=def=model", "http://h/v1=model"),
        ("http://h/v1?a=1&token=def", "http://h/v1"),
        ("http://u:p/w@h/v1=m", "http://h/v1=m"),
        ("Why? What a = b?", "Why? What a = b?"),
        ("rule.gamma=0.7", "rule.gamma=0.7"),
    ],
)
def test_a_log_holds_no_secret(given, shown):
    assert without_secrets(given) == shown
