"""Malformed GGUF files by the thousand, given to everything of ours that reads one.

    python tests/fuzz_gguf.py --seconds 600 --seed 7

Every file must be refused by a clear error of ours, or do no harm; a file that can be baked must come back from the
steered one bit for bit. Cases run in a child process whose memory is limited and which is watched for hangs and
crashes. Case ``N`` of a seed is always the same file; what fails is kept in the folder --save.
"""

import argparse
import collections
import hashlib
import importlib.util
import json
import os
import queue
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import fuzz_models
import fuzz_mutations
import fuzz_seeds
import numpy as np

from npti_export.compiler.exact import compile_exact
from npti_export.errors import NptiError
from npti_export.export.control_vector import read_directions
from npti_export.export.gguf import check_base, plan_bake, strip, write_bake
from npti_export.files import sha256_file
from npti_export.gguf.imatrix import read_imatrix
from npti_export.gguf.reader import mlp_widths
from npti_export.gguf.requantise import check_float, least_bytes, matrix_elements
from npti_export.gguf.shards import read_model, shard_paths
from npti_export.inspection import inspect_file
from npti_export.models import gguf_source
from npti_export.rule_io import base_name, load_rule

MEMORY = 256  # MB that a case may take beyond the process as it stands before the first
SECONDS = 5.0  # that a case may take
SILENCE = 20.0  # seconds without an answer after which a child is taken for hung
LONGEST_MESSAGE = 600
_WRITTEN = 4 << 20  # larger files are planned, but not written


@dataclass
class Case:
    """Files by name, the first first; the size of a single one with a hole at the end; what was done to which seed."""

    files: dict[str, bytes]
    size: int
    seed: str
    kinds: list[str]


def make_case(seeds, seed, number):
    """Case ``number`` of a seed."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(sorted(seeds))
    parts, kinds = [fuzz_seeds.take_apart(data) for data in seeds[name]], []
    file = rng.choice(parts)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3]) if len(parts) == 1 else rng.choice([0, 0, 1])):
        groups = [fuzz_mutations.KEYS, fuzz_mutations.TENSORS * (len(file.tensors) > 3), fuzz_models.SHAPES]
        groups += [fuzz_mutations.STEERING, fuzz_models.RECOVERY] * (2 if name.endswith("steered") else 0)
        mutation = rng.choice(rng.choice([group for group in groups if group]))
        mutation(rng, file, seeds)
        kinds.append(mutation.__name__)
    files = [[part, one] for part, one in zip(names_of(len(parts)), parts, strict=True)]
    for _ in range(rng.choice([1, 1, 2]) if len(parts) > 1 and not kinds else 0):
        mutation = rng.choice(fuzz_models.SPLIT)
        mutation(rng, files, seeds)
        kinds.append(mutation.__name__)
    written = {part: one.encode() for part, one in files}
    if not kinds or rng.random() < 0.2:
        mutation, (part, one) = rng.choice(fuzz_mutations.BYTES), rng.choice(files)
        data = bytearray(written[part])
        mutation(rng, data, max(1, len(data) - len(one.data)))
        written[part] = bytes(data)
        kinds.append(mutation.__name__)
    return Case(written, file.size if len(files) == 1 else 0, name, kinds)


def names_of(count):
    return [path.name for path in shard_paths(Path("case.gguf"), count)]


def bake(path, folder):
    """Bake a rule, in either layout, and take it out again."""
    base = read_model(path)
    with path.open("rb") as stream:  # what case it is, not what fell before it, says which
        layout = ("uniform", "ragged")[zlib.crc32(stream.read(1 << 16)) % 2]
    check_base(base, layout)
    rule = fuzz_seeds.rule_for(mlp_widths(base), per_layer=(2, 2))
    if layout == "ragged":
        rule.shift[0], rule.clamp[0] = 0, False
    program = compile_exact(rule, 4)
    paths = [part.path for part in base.parts]
    if base.size > _WRITTEN:
        plan_bake(base, program, {}, ["0" * 64] * len(paths), layout)
        return
    steered, back = (shard_paths(folder / name, len(paths)) for name in ("baked.gguf", "back.gguf"))
    write_bake(plan_bake(base, program, {}, [sha256_file(one) for one in paths], layout), steered[0])
    try:
        strip(steered[0], back[0], force=True)
    except NptiError as error:
        raise AssertionError(f"baked, but not to be stripped: {error}") from error
    assert [one.read_bytes() for one in back] == [one.read_bytes() for one in paths]


def strip_exactly(path, folder):
    """What is written is what the file says that its base was; else nothing is."""
    out = folder / "stripped.gguf"
    try:
        strip(path, out, force=True)
    except NptiError:
        assert not list(folder.glob("stripped*")), "wrote a base that it refused"
        raise
    parts = read_model(path).parts
    for part, file in zip(parts, shard_paths(out, len(parts)), strict=True):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == part.by_key["npti.base.sha256"].value


def rule_and_base(path, folder):
    """What ``--from`` does with a steered file: its rule, and its base under the name that it had."""
    load_rule(path)
    steered = read_model(path)
    base = shard_paths(folder / base_name(steered), len(steered.parts))
    strip(path, base[0], force=True)
    for one in base:
        one.unlink()


def requantise(path, folder):
    """What ``--requantize`` asks of a file before it is given to llama.cpp."""
    header = read_model(path)
    check_float(header, "Q8_0")
    assert least_bytes(matrix_elements(header), "Q8_0") >= 0


def importance(path, folder):
    """What ``--imatrix`` does with a file: whatever is read is fit for llama.cpp, which aborts on some of the rest."""
    read = read_imatrix(path)
    for values in read.importance(read.entries).values():
        assert np.isfinite(values).all()
        assert values.min() >= 0
    json.dumps(read.metadata)


TARGETS = {
    "read": lambda path, folder: read_model(path),
    "source": lambda path, folder: gguf_source(path),
    "inspect": lambda path, folder: json.dumps(inspect_file(path)),
    "rule": rule_and_base,
    "bake": bake,
    "strip": strip_exactly,
    "requantise": requantise,
    "importance": importance,
    "directions": lambda path, folder: read_directions(path, 4, 32),
}


def try_target(target, path, folder):
    """``accepted``, the name of our error, or ``FAULT: …``."""
    try:
        target(path, folder)
    except NptiError as error:
        text = str(error)
        # A steered file that is read in a rule's place, or a path, may stand anywhere in it; a line may not break.
        if str(path.parent) not in text:  # of a split model another part may be at fault
            return f"FAULT: the message does not name the file: {text[:300]}"
        if len(text) - len(str(path)) > LONGEST_MESSAGE or not text.isprintable():
            return f"FAULT: the message is too long or cannot be printed: {text[:300]!r}"
        return type(error).__name__
    except Exception as error:  # the very thing that is looked for
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        return f"FAULT: {type(error).__name__} at {where}: {str(error)[:200]}"
    return "accepted"


def run_case(targets, case, folder):
    """What each target says to a case, by its name."""
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    path = folder / next(iter(case.files))
    if case.size > path.stat().st_size:
        os.truncate(path, case.size)
    found = {}
    for name, target in targets.items():
        started = time.perf_counter()
        found[name] = try_target(target, path, folder)
        seconds = time.perf_counter() - started
        if seconds > SECONDS:
            found[name] = f"FAULT: took {seconds:.1f} s and said {found[name]}"
    left = {one.name for one in folder.iterdir()} - set(case.files)
    left = {name for name in left if not name.startswith(("baked", "back", "stripped"))}
    if left:
        found["read"] = f"FAULT: left behind {sorted(left)}"
    for one in folder.iterdir():
        one.unlink()
    return found


def load_targets(also):
    """Ours, and the functions ``target_NAME(path, folder)`` of a Python file."""
    if also is None:
        return TARGETS
    spec = importlib.util.spec_from_file_location("also", also)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    more = {name.removeprefix("target_"): one for name, one in vars(module).items() if name.startswith("target_")}
    return TARGETS | more


def work(seed, start, also, memory):
    """The child: cases from ``start`` on, one line of JSON for each, until it is ended."""
    warnings.simplefilter("ignore")  # overflows in weights that were made NaN
    targets = load_targets(also)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "seeds").mkdir()
        seeds = fuzz_seeds.write_seeds(folder / "seeds")
        (folder / "cases").mkdir()
        for name, parts in seeds.items():  # imports what is imported late
            case = Case(dict(zip(names_of(len(parts)), parts, strict=True)), 0, name, [])
            found = run_case(TARGETS, case, folder / "cases")
            assert found["read"] == "accepted", found
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (memory << 20),) * 2)
        number = start
        while os.getppid() != 1:
            found = run_case(targets, make_case(seeds, seed, number), folder / "cases")
            print(json.dumps([number, found]), flush=True)
            number += 1


@dataclass
class Tally:
    """What came of the cases."""

    cases: int = 0
    kinds: dict[str, collections.Counter] = field(default_factory=lambda: collections.defaultdict(collections.Counter))
    targets: dict[str, collections.Counter] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    faults: list[str] = field(default_factory=list)

    def add(self, case, found):
        self.cases += 1
        for name, said in found.items():
            self.targets[name]["FAULT" if said.startswith("FAULT") else said] += 1
        for kind in case.kinds:
            faulty = any(said.startswith("FAULT") for said in found.values())
            self.kinds[kind]["fault" if faulty else "read" if found["read"] == "accepted" else "refused"] += 1

    def table(self):
        lines = [f"{'kind':<20}{'tried':>8}{'not read':>10}{'faults':>8}"]
        for kind, found in sorted(self.kinds.items()):
            lines.append(f"{kind:<20}{sum(found.values()):>8}{found['refused']:>10}{found['fault']:>8}")
        for name, found in self.targets.items():
            lines.append(f"{name}: " + ", ".join(f"{said} {count}" for said, count in found.most_common()))
        return "\n".join([*lines, *self.faults, f"{self.cases} cases, {len(self.faults)} faults"])


def start_child(seed, start, also, memory):
    command = [sys.executable, __file__, "--child", "--seed", str(seed), "--start", str(start), "--memory", str(memory)]
    command += ["--also", str(also)] if also else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = queue.Queue()

    def follow():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=follow, daemon=True).start()
    return process, lines


def campaign(seed, seconds, cases=None, start=0, also=None, save=None, memory=MEMORY, silence=SILENCE, patience=60.0):
    """Run cases from ``start`` on for so many seconds, or so many of them, whichever ends first.

    A child may be silent for ``silence`` seconds, and ``patience`` more before its first answer, as it has to import.

    Returns:
        A :class:`Tally`; a child that hung, crashed or was ended by the system counts as one fault of its case.
    """
    tally, number = Tally(), start
    with tempfile.TemporaryDirectory() as folder:
        seeds = fuzz_seeds.write_seeds(Path(folder))
    end = time.monotonic() + seconds
    process, lines = start_child(seed, number, also, memory)
    first = True
    try:
        while (cases is None or number < start + cases) and time.monotonic() < end:
            try:  # the first answer takes the imports, too
                line = lines.get(timeout=silence + patience * first)
                why = "crashed"
            except queue.Empty:
                line, why = None, f"hung for {silence} s"
            first = False
            case = make_case(seeds, seed, number)
            if line is None:
                process.kill()
                _, said = process.communicate()
                found = dict.fromkeys(TARGETS, "not known")
                found["child"] = f"FAULT: {why} (exit code {process.returncode}) {said[-300:]}"
                process, lines = start_child(seed, number + 1, also, memory)
                first = True
            else:
                told, found = json.loads(line)
                assert told == number
            tally.add(case, found)
            for name, said in found.items():
                if said.startswith("FAULT"):
                    what = f"{case.seed}: {', '.join(case.kinds)}"
                    tally.faults.append(f"seed {seed} case {number} ({what}) {name}: {said}")
                    if save is not None:
                        folder = save / f"{seed}-{number}-{name}"
                        folder.mkdir(parents=True, exist_ok=True)
                        for file, data in case.files.items():
                            (folder / file).write_bytes(data)
            number += 1
    finally:
        process.kill()
        process.communicate()
    return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--memory", type=int, default=MEMORY, help="MB beyond the imports that a case may take")
    parser.add_argument("--save", type=Path, default=Path("fuzz-found"), help="folder for files that fail")
    parser.add_argument("--also", type=Path, help="a Python file with functions target_NAME(path, folder)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work(arguments.seed, arguments.start, arguments.also, arguments.memory)
        return 0
    tally = campaign(
        arguments.seed,
        arguments.seconds,
        arguments.cases,
        arguments.start,
        arguments.also,
        arguments.save,
        arguments.memory,
    )
    print(tally.table())
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
