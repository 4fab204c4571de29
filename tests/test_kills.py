"""A short run of ``benchmarks/faults.py``: jobs killed at random moments, and broken otherwise, once each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "faults.py"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def faults(out, *arguments):
    """A process of its own: one that runs models cannot be forked."""
    command = [sys.executable, SCRIPT, "--out", out, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1800)
    return done, [json.loads(line) for line in out.read_text().splitlines()]


def test_kills(tmp_path):
    done, found = faults(tmp_path / "f.jsonl", "--kills", "12", "--kinds", "kill", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(one["kills"] for one in found) >= 12
    assert not any(one["wrong"] for one in found)
    stages = {what.split(",")[0] for one in found for what in one["met"] if "too late" not in what}
    assert len(stages) > 3, stages  # it died at its work, and at different places
    again, more = faults(tmp_path / "f.jsonl", "--kills", "12", "--kinds", "kill", "--seed", "1")
    assert (again.returncode, more) == (0, found)  # nothing is done twice


def test_other_faults(tmp_path):
    kinds = ["interrupt", "file size limit", "folder removed", "base lost", "two jobs", "damaged cache"]
    done, found = faults(tmp_path / "f.jsonl", "--others", "1", "--kinds", *kinds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {one["kind"] for one in found} == set(kinds)


def test_other_commands_and_failing_disks(tmp_path):
    """With a seed that draws commands which take no torch; the others are for longer runs."""
    kinds = ["kill, stripped", "kill, split", "fsync fails", "write fails", "refused in C"]
    kinds += ["damaged vector", "damaged shards"]
    done, found = faults(tmp_path / "f.jsonl", "--others", "1", "--seed", "1411", "--kinds", *kinds)
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = {kind for kind in kinds if f"{kind:26} {'':6} {'':6}  left out" in done.stdout}
    assert {one["kind"] for one in found} | left_out == set(kinds)
    met = {one["kind"]: one["met"] for one in found}
    assert any("exit" in what for kind in ("fsync fails", "write fails") for what in met[kind])  # something failed
