"""Mutated files of every kind that we read, given to the parser of each, with bounds on time and memory.

    python tests/fuzz_run.py --inputs 10000 --seed 0

``fuzz_targets`` lists the parsers. Each input must be refused by an error of ours, in time, or be accepted whole.
Input ``N`` of a seed is always the same file; what fails is kept in the folder --save. Inputs run in a child process
whose memory is limited and which is watched for hangs and crashes. GGUF files get many more, of their own kind, from
``fuzz_gguf.py``.
"""

import argparse
import collections
import faulthandler
import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import fuzz_bytes
from fuzz_targets import TARGETS

MEMORY = 512  # MB that an input may take beyond the process as it stands before the first
SECONDS = 10.0  # of processor time that an input may take, children not counted
SLOWER = 3.0  # times an intact one, where that is more: drawing a whole page takes seconds, and twice as long traced
SILENCE = 30.0  # seconds of work without an answer after which the child is taken for hung; imports take some
LONGEST_MESSAGE = 4000


def prepared(name, folder):
    """A folder for a target's file, with what lies beside it, and intact contents of the file."""
    target = TARGETS[name]
    place = folder / name / "case"
    place.mkdir(parents=True)
    seeds = target.prepare(place)
    path = place / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, seeds


def make_input(name, seeds, seed, number):
    """Input ``number`` of a seed, for a target; the first of each target is intact."""
    rng = random.Random(f"{seed}:{name}:{number}")
    return fuzz_bytes.mutated(rng, TARGETS[name].kind, seeds)


def try_target(name, path):
    """``accepted``, the name of our error, or ``FAULT: …``."""
    try:
        TARGETS[name].read(path)
    except TARGETS[name].allowed as error:
        text = str(error)
        if len(text) > LONGEST_MESSAGE:
            return f"FAULT: a message of {len(text)} characters: {text[:200]!r}"
        return type(error).__name__
    except Exception as error:  # the very thing that is looked for
        trace = error.__traceback__
        ours = None
        while trace:
            if (
                "npti_export" in trace.tb_frame.f_code.co_filename
                or "fuzz_targets" in trace.tb_frame.f_code.co_filename
            ):
                ours = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return f"FAULT: {type(error).__name__} at {ours}: {str(error)[:200]!r}"
    return "accepted"


def names_for(count, targets):
    """Which target each input is for: round and round."""
    return [targets[number % len(targets)] for number in range(count)]


def work(seed, start, count, targets, memory, trace):
    """The child: one line of JSON for each input."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with tempfile.TemporaryDirectory() as folder:
        places = {name: prepared(name, Path(folder)) for name in targets}
        took = {}
        for name, (path, seeds) in places.items():  # imports what is imported late, and is accepted
            _fresh(path, seeds[0])
            said = try_target(name, path)
            assert said == "accepted", f"{name}: {said}"
            took[name] = _seconds(name, path, trace)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (memory << 20),) * 2)
        print(json.dumps("ready"), file=answers, flush=True)
        for number, name in enumerate(names_for(count, targets)):
            if number < start:
                continue
            path, seeds = places[name]
            _fresh(path, make_input(name, seeds, seed, number))
            if trace:
                tracemalloc.start()
            started = time.process_time()
            said = try_target(name, path)
            seconds = time.process_time() - started
            peak = tracemalloc.get_traced_memory()[1] if trace else 0
            tracemalloc.stop()
            if seconds > max(SECONDS, SLOWER * took[name]):
                said = f"FAULT: took {seconds:.1f} s and said {said}"
            print(json.dumps([number, said, seconds, peak]), file=answers, flush=True)


def _seconds(name, path, trace):
    """Of processor time, for an intact file, when all that is imported late has been."""
    if trace:
        tracemalloc.start()
    started = time.process_time()
    try_target(name, path)
    tracemalloc.stop()
    return time.process_time() - started


def _fresh(path, data):
    """The damaged file, and none of what an earlier one left beside it."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    for left in path.parent.glob(".*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@dataclass
class Tally:
    """What came of the inputs to a target."""

    inputs: int = 0
    said: collections.Counter = field(default_factory=collections.Counter)
    slowest: float = 0.0
    fattest: int = 0


@dataclass
class Found:
    """Of a whole run."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def inputs(self):
        return sum(one.inputs for one in self.tallies.values())

    def table(self):
        lines = [
            f"{'target':<18}{'inputs':>8}{'accepted':>10}{'refused':>9}{'slowest s':>11}{'fattest MB':>12}{'faults':>8}"
        ]
        for name, one in self.tallies.items():
            accepted, faults = one.said["accepted"], one.said["FAULT"]
            lines.append(
                f"{name:<18}{one.inputs:>8}{accepted:>10}{one.inputs - accepted - faults:>9}{one.slowest:>11.3f}"
                f"{one.fattest / 2**20:>12.1f}{faults:>8}"
            )
        return "\n".join([*lines, *self.faults, f"{self.inputs} inputs, {len(self.faults)} faults"])


def start_child(seed, start, count, targets, memory, trace):
    command = [sys.executable, __file__, "--child", "--seed", str(seed), "--start", str(start), "--inputs", str(count)]
    command += ["--memory", str(memory), "--targets", *targets] + ([] if trace else ["--no-trace"])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = queue.Queue()

    def follow(stream, into):
        for line in stream:
            into.put(line)
        into.put(None)

    said = queue.Queue()
    threading.Thread(target=follow, args=(process.stdout, lines), daemon=True).start()
    threading.Thread(target=follow, args=(process.stderr, said), daemon=True).start()
    return process, lines, said


def _next(lines, process, silence):
    """The child's next line, and why there is none: it crashed, or worked for too long on one input.

    What counts is its processor time: on a busy machine the clock says little.
    """
    begun, started = _processor(process), time.monotonic()
    while True:
        with suppress(queue.Empty):
            return lines.get(timeout=1.0), "crashed"
        took = _processor(process) - begun
        if took > silence or time.monotonic() - started > 20 * silence:
            return None, f"hung: no answer after {took:.0f} s of work"


def _processor(process):
    """Seconds of processor time of a child that has not been waited for."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rest(lines):
    return "".join(iter(lambda: lines.get() or "", ""))[-600:]


def run(inputs, seed, targets=None, *, seconds=float("inf"), memory=MEMORY, silence=SILENCE, save=None, trace=True):
    """So many inputs over the targets in turn, or as many as so many seconds allow."""
    targets = list(targets or TARGETS)
    found = Found({name: Tally() for name in targets})
    names, number, end = names_for(inputs, targets), 0, float("inf")
    with tempfile.TemporaryDirectory() as folder:
        places, begun = {}, False
        process, lines, complaints = start_child(seed, 0, inputs, targets, memory, trace)
        try:
            while number < inputs and time.monotonic() < end:
                line, why = _next(lines, process, silence)
                if line == '"ready"\n':
                    if not begun:  # imports took their time, which is none of the inputs'
                        begun, end = True, time.monotonic() + seconds
                    continue
                name = names[number]
                if line is None:
                    process.kill()
                    process.wait()
                    told = _rest(complaints)
                    said, took, peak = f"FAULT: {why} (exit code {process.returncode}) {told}", 0.0, 0
                    process, lines, complaints = start_child(seed, number + 1, inputs, targets, memory, trace)
                else:
                    told, said, took, peak = json.loads(line)
                    assert told == number
                tally = found.tallies[name]
                tally.inputs += 1
                tally.slowest, tally.fattest = max(tally.slowest, took), max(tally.fattest, peak)
                tally.said["FAULT" if said.startswith("FAULT") else said] += 1
                if said.startswith("FAULT"):
                    found.faults.append(f"seed {seed} input {number} {name}: {said}")
                    if save is not None:
                        if name not in places:
                            places[name] = prepared(name, Path(folder))
                        save.mkdir(parents=True, exist_ok=True)
                        data = make_input(name, places[name][1], seed, number)
                        (save / f"{seed}-{number}-{name}-{Path(TARGETS[name].file).name}").write_bytes(data)
                number += 1
        finally:
            process.kill()
            process.wait()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--memory", type=int, default=MEMORY, help="MB that an input may take")
    parser.add_argument("--save", type=Path, default=Path("fuzz-found"), help="folder for files that fail")
    parser.add_argument("--no-trace", action="store_true", help="do not measure memory; twice as fast")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        work(asked.seed, asked.start, asked.inputs, asked.targets, asked.memory, not asked.no_trace)
        os._exit(0)
    found = run(asked.inputs, asked.seed, asked.targets, memory=asked.memory, save=asked.save, trace=not asked.no_trace)
    print(found.table())
    sys.exit(bool(found.faults))


if __name__ == "__main__":
    main()
