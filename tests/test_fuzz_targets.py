"""Every parser of ours refuses damaged files by an error of ours, in bounded time and memory, or reads them whole."""

import random
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import fuzz_bytes
import fuzz_run
import pytest
from fuzz_targets import TARGETS, loaded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Those of GGUF files get thousands in test_fuzz.py; a template and a model's folder start a process, or import torch.
HEAVY = {"chat-template", "report-page", "config.json", "tokenizer_config", "weight-index", "weights", "model-card"}
SLOW = [*loaded.TARGETS, "study"]  # some ten a second
GGUFS = {"overlaps", *(name for name in TARGETS if name.startswith(("gguf-", "split-")))}
QUICK = [name for name in TARGETS if name not in {*HEAVY, *SLOW, *GGUFS}]
SPOKEN = [
    "trait",
    "whole-trait",
    "mix",
    "poles",
    "judge",
    "address",
    "program",
    "rating",
    "items",
    "override",
    "topics",
    "fields",
    "leftover",
]


def test_mutated_files_of_every_kind():
    """The command line of fuzz_run.py runs it for longer, and over the rest."""
    found = fuzz_run.run(20 * len(QUICK), seed=5, targets=QUICK, seconds=40, trace=False)
    assert found.faults == [], "\n".join(found.faults)
    assert found.inputs > 5 * len(QUICK)
    for name, tally in found.tallies.items():
        if TARGETS[name].allowed and tally.inputs > 15:
            assert set(tally.said) - {"accepted"}, f"{name} refuses nothing"


def test_mutated_files_that_are_loaded():
    """By transformers, PEFT and optuna, of which each has its own ways to fail."""
    found = fuzz_run.run(8 * len(SLOW), seed=7, targets=SLOW, seconds=15, memory=3000, trace=False)
    assert found.faults == [], "\n".join(found.faults)
    assert found.inputs > 2 * len(SLOW)


@pytest.mark.parametrize("name", SPOKEN)
def test_any_text_at_all(name):
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t"

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.text(max_size=300) | st.text("+-:.,%0123456789eE/~ {}[]\"'=", max_size=40))
        def check(text):
            path.write_bytes(text.encode("utf-8", "replace"))
            try:
                target.read(path)
            except target.allowed as error:
                assert 0 < len(str(error)) < fuzz_run.LONGEST_MESSAGE

        check()


def test_an_input_is_always_the_same(tmp_path):
    for name in ("recipe", "evaluation", "profile", "verdicts", "imatrix-dat"):
        _, seeds = fuzz_run.prepared(name, tmp_path)
        inputs = [fuzz_run.make_input(name, seeds, 3, number) for number in range(30)]
        assert inputs == [fuzz_run.make_input(name, seeds, 3, number) for number in range(30)]
        assert len(set(inputs)) > 25


@pytest.mark.parametrize("kind", fuzz_bytes.KINDS)
def test_mutations_change_files(kind, tmp_path):
    name = next(name for name, target in TARGETS.items() if target.kind == kind)
    _, seeds = fuzz_run.prepared(name, tmp_path)
    changed = [fuzz_bytes.mutated(random.Random(number), kind, seeds) for number in range(200)]
    assert sum(one not in seeds for one in changed) > 150


def test_planted_faults_are_found(tmp_path):
    """A reader that raises, takes memory, accepts what is broken, says too much, hangs."""
    code = """
        import os, sys, time
        sys.path.insert(0, TESTS)
        import fuzz_run, fuzz_targets
        from npti_export.errors import NptiError

        def read(path):
            data = path.read_bytes()
            if data == b"intact":
                return
            number = read.count = read.count + 1
            if number == 1:
                raise KeyError("x")
            if number == 2:
                bytearray(1 << 31)
            if number == 3:
                assert False, "broken"
            if number == 4:
                raise NptiError("x" * 9999)
            if number == 5:
                end = time.process_time() + 60
                while time.process_time() < end:
                    pass
            raise NptiError("fine")

        read.count = int(os.environ.get("COUNTED", 0))
        fuzz_targets.TARGETS = fuzz_run.TARGETS = {
            "planted": fuzz_targets.Target("text", "t", lambda folder: [b"intact"], read)
        }
        if "--child" in sys.argv:
            fuzz_run.main()
        fuzz_run.__file__ = __file__
        found = fuzz_run.run(6, 0, ["planted"], silence=4, trace=False)
        print(found.table())
    """
    script = tmp_path / "planted.py"
    tests = repr(str(Path(fuzz_run.__file__).parent))
    script.write_text(textwrap.dedent(code).replace("TESTS", tests))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for number, said in enumerate(("KeyError", "MemoryError", "AssertionError", "a message of 9999", "hung")):
        assert any(f"input {number} planted: FAULT" in line and said in line for line in done.stdout.splitlines()), said
    # The child that takes over counts from one again.
    assert "6 inputs, 6 faults" in done.stdout


def test_coverage_guided_fuzzing_runs():
    """Extra ``fuzz``: a short run of atheris over one target finds nothing, and says how much it tried."""
    pytest.importorskip("atheris", reason="atheris is not installed (extra fuzz)")
    script = Path(fuzz_run.__file__).with_name("fuzz_coverage.py")
    done = subprocess.run(
        [sys.executable, str(script), "program", "-runs=300"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done 300 runs" in done.stderr
