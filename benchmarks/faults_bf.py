"""The main job, broken on purpose: kills at random moments, full disks, failing writes, vanishing and damaged files.

On a tiny model, so that a run takes about a second of a core: each is a fork of this process, which has imported
everything. After each fault: nothing half-written under the output's name, no broken file in the cache, no traceback,
no signal but ours, no hang; and running the same command again gives the bytes of a run that nobody disturbed.

    python benchmarks/faults.py --kills 500 --others 20 --seed 0

A stopped run goes on (``--out FILE``, JSON lines; each trial draws from a seed of its own). Exit code 1 if anything
was wrong. Full disks need root (a small tmpfs is mounted); without it they are left out, and the table says so.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# before numpy is imported: a process that is forked may have no threads
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from families import cut_tokenizer, write_tiny
from forked import BEFORE, Run, import_what_a_run_imports, threads
from jobs import main_job

from npti_export.checked import load_checked
from npti_export.errors import DamagedError
from npti_export.files import sha256_file
from npti_export.models import default_model_path

OUT = Path(__file__).parent / "out" / "faults.jsonl"
NAME = "model.gguf"
JOB = ["--threads", "1", "--set", "rule.matched=0.5", "--set", "identify.matched_questions=2"]
JOB += ["--set", "compile.calibration_tokens=64", "--weights", "bfloat16"]
VERIFY = ["--threads", "1", "--set", "verify.prompts=2", "--set", "verify.answer_tokens=8"]
NOBODY = 65534
AT_A_WRITE = 0.3  # share of the kills that aim at a file that is being written
MOST_IN_A_ROW = 3


@dataclass
class Setting:
    """What all trials share.

    Attributes:
        root: folder of everything, removed at the end.
        model: the tiny base.
        seconds: that an undisturbed run takes.
        whole: SHA-256 of what it writes.
        profile, adapter, recipe: inputs of other runs, made by undisturbed ones.
    """

    root: Path
    model: Path
    seconds: float = 0.0
    whole: str = ""
    profile: Path | None = None
    adapter: Path | None = None
    recipe: Path | None = None

    def environment(self, cache):
        return {**os.environ, "NPTI_CACHE": str(cache)}

    def job(self, *more, model=None):
        return [*main_job(model or self.model, NAME), *JOB, *more]


class Place:
    """Output folder and cache of one trial, and what was wrong there."""

    def __init__(self, setting, root, model=None):
        self.setting, self.model = setting, model or setting.model
        self.out, self.cache, self.temporary = root / "out", root / "cache", root / "tmp"
        for folder in (self.out, self.cache, self.temporary):
            folder.mkdir(parents=True)
        self.file = self.out / NAME
        self.wrong, self.said = [], ""

    def start(self, *more, prepare=None):
        arguments = self.setting.job(*more, model=self.model)

        def begin():
            tempfile.tempdir = str(self.temporary)  # the parent has asked for the system's place already
            if prepare is not None:
                prepare()

        return Run(arguments, self.out, self.setting.environment(self.cache), begin)

    def leftovers(self):
        partial = [path for folder in (self.out, self.cache) for path in folder.rglob(".*.partial")]
        return partial + list(self.temporary.iterdir())

    def check_files(self, *allowed):
        """Nothing half-written under a name that counts, output or cache."""
        if self.file.exists() and sha256_file(self.file) not in (self.setting.whole, *allowed):
            self.wrong.append("broken output")
        for path in self.cache.glob("*/*.safetensors"):
            try:
                load_checked(path)
            except DamagedError:  # noqa: PERF203
                self.wrong.append("broken cache")

    def check(self, ended, *allowed):
        if ended.fault:
            self.wrong.append(f"{ended.fault}: {ended.said[-600:]}")
        self.check_files(*allowed)

    def finish(self, *more):
        """The same command again, undisturbed: the same bytes, and nothing beside them."""
        ended = self.start("--force", *more).wait()
        self.check(ended)
        if ended.code != 0:
            self.wrong.append(f"not finished: {ended.said[-600:]}")
        elif not self.file.is_file():
            self.wrong.append("no output")
        if self.leftovers():
            self.wrong.append(f"left over: {self.leftovers()}")
        return "went on from its cache" if "going on from" in ended.said else "began afresh"


def ending(ended):
    return "done" if ended.code == 0 else f"exit {ended.code}"


def kill(place, draw):
    """Up to three kills in a row, then to the end; sometimes over an older file that is to be replaced."""
    old = ()
    more = []
    if draw.random() < 0.25:
        place.file.write_bytes(b"an older file")
        old, more = (sha256_file(place.file),), ["--force"]
    met = []
    for _ in range(draw.randint(1, MOST_IN_A_ROW)):
        run, where = place.start(*more), ""
        if draw.random() < AT_A_WRITE:
            nth, later = draw.randint(1, 8), draw.choice([0.0, draw.uniform(0, 0.003)])
            seen = set()

            def written(seen=seen, nth=nth):
                seen.update(place.leftovers())
                return len(seen) >= nth

            run.wait_until(written)
            time.sleep(later)
            where = ", at a write"
        else:
            moment = draw.uniform(0, place.setting.seconds)
            run.wait_until(lambda run=run, moment=moment: time.monotonic() - run.began >= moment)
        killed = run.kill()
        ended = run.wait()
        met.append(f"{ended.stage}{where}" if killed else "too late: it had ended")
        place.check_files(*old)
        if killed and place.leftovers():
            met[-1] += ", leaving a temporary file"
        if not killed:
            if ended.fault:
                place.check(ended, *old)
            break
    if place.file.exists() and not old and not more and sha256_file(place.file) == place.setting.whole:
        return met, "was complete"
    return met, place.finish(*more)


def interrupt(place, draw):
    """Ctrl-C, or a shutdown's SIGTERM: one line that says how to go on, and nothing left beside the output."""
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    run = place.start()
    moment = draw.uniform(0, place.setting.seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    sent = not run.poll()
    if sent:
        os.kill(run.pid, number)
    ended = run.wait()
    if sent and ended.code in (-number, 70) and ended.stage == BEFORE:
        met = "before the command line had begun"  # which is up to Python
    else:
        place.check(ended)
        met = f"{number.name}: {ending(ended)}, {ended.stage}"
        if ended.code not in (0, 130) or (ended.code == 130 and "interrupted; nothing was" not in ended.sentence):
            place.wrong.append(f"no word of the interruption: {ended.said[-600:]}")
        if place.leftovers():
            place.wrong.append(f"left over: {place.leftovers()}")
    return [met], place.finish()


def file_size_limit(place, draw):
    """Writes fail behind a random number of bytes, as on a full disk."""
    import resource

    allowed = draw.randint(20_000, 900_000)
    ended = place.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, allowed))).wait()
    place.check(ended)
    return [ending(ended)], place.finish()


def disk_full(place, draw):
    """A small disk of its own fills up at a random moment."""
    run = place.start()
    moment = draw.uniform(0, place.setting.seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    filler = place.out / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 14))
    ended = run.wait()
    place.check(ended)
    filler.unlink()
    return [ending(ended)], place.finish()


def read_only(place, draw):
    """A folder, of the output or the cache, that the job may not write to."""
    folder = draw.choice([place.out, place.cache])
    other = place.cache if folder is place.out else place.out
    folder.chmod(0o555)
    other.chmod(0o777)

    def prepare():
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    ended = place.start(prepare=prepare if os.getuid() == 0 else None).wait()
    place.check(ended)
    if ended.code == 0:
        place.wrong.append("wrote where it may not")
    folder.chmod(0o755)
    return [f"{folder.name}: {ending(ended)}"], place.finish()


def folder_removed(place, draw):
    """The output's folder, or the cache, is removed at a random moment."""
    folder = draw.choice([place.out, place.cache])
    run = place.start()
    moment = draw.uniform(0, place.setting.seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    shutil.rmtree(folder, ignore_errors=True)
    ended = run.wait()
    place.check(ended)
    for path in (place.out, place.cache):
        path.mkdir(exist_ok=True)
    return [f"{folder.name}: {ending(ended)}"], place.finish()


def base_lost(place, draw):
    """The base is removed, or cut short, at a random moment."""
    base = place.out.parent / place.setting.model.name
    shutil.copy2(place.setting.model, base)
    place.model = base
    how = draw.choice(["removed", "cut short"])
    run = place.start()
    moment = draw.uniform(0, place.setting.seconds)
    run.wait_until(lambda: time.monotonic() - run.began >= moment)
    if how == "removed":
        base.unlink()
    else:
        os.truncate(base, draw.randrange(base.stat().st_size))
    ended = run.wait()
    place.check(ended)
    shutil.copy2(place.setting.model, base)
    return [f"{how}: {ending(ended)}"], place.finish()


def two_jobs(place, draw):
    """Two jobs on one output and one cache, the second some moments later."""
    more = draw.choice([[], ["--force"]])
    one = place.start(*more)
    time.sleep(draw.uniform(0, place.setting.seconds / 2))
    two = place.start(*more)
    ends = [one.wait(), two.wait()]
    for ended in ends:
        place.check(ended)
    codes = sorted(ended.code if ended.code is not None else -1 for ended in ends)
    if codes not in ([0, 0], [0, 2]) or (more and codes != [0, 0]):
        place.wrong.append(f"two jobs ended with {codes}: {[ended.sentence for ended in ends]}")
    if place.leftovers():
        place.wrong.append(f"left over: {place.leftovers()}")
    return [f"{'--force' if more else 'no --force'}: exit {codes[0]} and {codes[1]}"], "same bytes"


def damaged(data, draw):
    """Some bits turned over, a piece cut off the end, or a piece zeroed."""
    how = draw.choice(["bits", "bits", "cut", "zeros"])
    if how == "cut":
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    if how == "zeros":
        start = draw.randrange(len(data))
        length = min(draw.randint(1, 4096), len(data) - start)
        changed[start : start + length] = bytes(length)
    else:
        for _ in range(draw.choice([1, 1, 8])):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def damaged_input(place, draw):
    """An input that is not what it was: base, profile, adapter, recipe. Refused, or used as what it now says."""
    setting = place.setting
    which = draw.choice(["base", "profile", "adapter", "recipe"])
    source = inputs(setting)[which]
    copy = target = place.out.parent / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
        target = draw.choice(sorted(path for path in copy.iterdir() if path.name != "README.md"))
    else:
        shutil.copy(source, copy)
    target.write_bytes(damaged(target.read_bytes(), draw))
    arguments = used(setting, which, copy)
    ended = Run(arguments, place.out, setting.environment(place.cache)).wait()
    place.said = ended.sentence if ended.code else ""
    if ended.fault:
        place.wrong.append(f"{ended.fault}: {ended.said[-600:]}")
    if place.leftovers() or (ended.code != 0 and place.file.exists()):
        place.wrong.append("something was left")
    return [f"{which}: {'used' if ended.code == 0 else ending(ended)}"], ""


def damaged_cache(place, draw):
    """A kept file that is not what it was: made again, with a note, and the same bytes come out."""
    first = place.start().wait()
    place.check(first)
    place.file.unlink()
    target = draw.choice(sorted(place.cache.glob("*/*.safetensors")))
    before = target.read_bytes()
    after = damaged(before, draw)
    target.write_bytes(after)
    ended = place.start().wait()
    place.check(ended)
    if ended.code != 0 or not place.file.is_file():
        place.wrong.append(f"not finished: {ended.said[-600:]}")
    if after != before and "damaged" not in ended.said:
        place.wrong.append("no note of the damage")
    return [f"{target.parent.name}: {'made again' if after != before else 'nothing was changed'}"], "same bytes"


KINDS = {
    "kill": kill,
    "interrupt": interrupt,
    "file size limit": file_size_limit,
    "disk full": disk_full,
    "read-only folder": read_only,
    "folder removed": folder_removed,
    "base lost": base_lost,
    "two jobs": two_jobs,
    "damaged input": damaged_input,
    "damaged cache": damaged_cache,
}


@contextlib.contextmanager
def room(setting, kind):
    """A folder for a trial; on a disk of its own of two outputs' size for those that fill it."""
    folder = Path(tempfile.mkdtemp(dir=setting.root))
    folder.chmod(0o755)
    size = 4 * setting.model.stat().st_size
    mounted = kind == "disk full"
    try:
        if mounted:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True
            )
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def can_mount(setting):
    try:
        with room(setting, "disk full"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def prepared(root, kinds):
    """The model, one undisturbed run, and the inputs that other runs need."""
    setting = Setting(root, root / "tiny.gguf")
    root.chmod(0o755)
    write_tiny(setting.model, cut_tokenizer(default_model_path()), "F32")
    first = Place(setting, root / "first")
    setting.recipe = root / "mine.toml"
    setting.recipe.write_text('extends = "npti"\nname = "mine"\n[rule]\ngamma = 1.2\n')
    if "damaged input" in kinds:
        setting.profile, setting.adapter = root / "p.safetensors", root / "adapter"
    ended = import_what_a_run_imports(setting.job(), first.out, setting.environment(first.cache))
    if ended.code != 0:
        sys.exit(f"the undisturbed run failed: {ended.said}")
    setting.whole = sha256_file(first.file)
    second = Place(setting, root / "second")
    began = time.monotonic()
    ended = second.start().wait()
    setting.seconds = time.monotonic() - began
    second.check(ended)
    if second.wrong or ended.code != 0:
        sys.exit(f"two undisturbed runs differ: {second.wrong}")
    if setting.profile is not None:
        made_inputs(setting, second)
    if threads() > 1:
        sys.exit(f"this process has {threads()} threads; a fork of it would not be a run like any other")
    return setting


def made_inputs(setting, place):
    """A profile and an adapter; they, and the recipe, are used where nobody damages them."""
    runs = {
        "profile": setting.job("--save-profile", setting.profile, "--force"),
        "adapter": [*main_job(setting.model, setting.adapter), *JOB, "--format", "peft"],
    }
    runs |= {f"the {which} used": used(setting, which, copy) for which, copy in inputs(setting).items()}
    for what, arguments in runs.items():
        ended = Run([*arguments, "--force"], place.out, setting.environment(place.cache)).wait()
        if ended.code != 0:
            sys.exit(f"{what}: {ended.said}")


def inputs(setting):
    return {"base": setting.model, "profile": setting.profile, "adapter": setting.adapter, "recipe": setting.recipe}


def used(setting, which, path):
    """The command line of a job that reads an input."""
    if which == "adapter":
        return ["--from", path, "--model", setting.model, "--out", NAME, *VERIFY]
    if which == "recipe":
        return [*setting.job(), "--recipe", path]
    return setting.job("--profile", path) if which == "profile" else setting.job(model=path)


def trial(setting, kind, number, seed):
    draw = random.Random(f"{seed} {kind} {number}")
    with room(setting, kind) as folder:
        place = Place(setting, folder)
        if kind == "read-only folder":
            folder.chmod(0o755)
        met, after = KINDS[kind](place, draw)
        kills = sum("too late" not in one for one in met) if kind == "kill" else 0
        return {"kind": kind, "number": number, "seed": seed, "met": met, "after": after, "kills": kills,
                "wrong": place.wrong, "said": place.said}  # fmt: skip


def table(found, skipped):
    """Lines of the report: what was tried, and what happened."""
    print(f"{'fault':18} {'tried':>6} {'wrong':>6}  what happened")
    for kind in KINDS:
        of_kind = [one for one in found if one["kind"] == kind]
        if kind in skipped:
            print(f"{kind:18} {'':6} {'':6}  left out: {skipped[kind]}")
        if not of_kind:
            continue
        tried = sum(one["kills"] for one in of_kind) if kind == "kill" else len(of_kind)
        wrong = sum(bool(one["wrong"]) for one in of_kind)
        after = Counter(one["after"] for one in of_kind if one["after"])
        print(f"{kind:18} {tried:6} {wrong:6}  {'; '.join(f'{name} {count}' for name, count in after.most_common())}")
        met = Counter(what for one in of_kind for what in one["met"])
        for what, count in sorted(met.items(), key=lambda item: (-item[1], item[0])):
            print(f"{'':32}  {count:5} {what}")
    for one in found:
        for fault in one["wrong"]:
            print(f"WRONG {one['kind']} {one['number']} (seed {one['seed']}): {fault}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--others", type=int, default=20, help="trials of each other kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines, gone on with")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.is_file() else []
    found = [one for one in map(json.loads, lines) if one["seed"] == options.seed]
    done = {(one["kind"], one["number"]) for one in found}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        setting = prepared(Path(folder), options.kinds)
        skipped = {}
        if "disk full" in options.kinds and not can_mount(setting):
            skipped["disk full"] = "no disk can be mounted here"
        for kind in (one for one in options.kinds if one not in skipped):
            number = 0
            while time.monotonic() - began < 60 * options.minutes:
                of_kind = [one for one in found if one["kind"] == kind]
                if kind == "kill" and sum(one["kills"] for one in of_kind) >= options.kills:
                    break
                if kind != "kill" and number >= options.others:
                    break
                if (kind, number) not in done:
                    found.append(trial(setting, kind, number, options.seed))
                    with options.out.open("a") as stream:
                        stream.write(json.dumps(found[-1]) + "\n")
                number += 1
    print(f"an undisturbed run takes {setting.seconds:.2f} s here; {time.monotonic() - began:.0f} s for all")
    table(found, skipped)
    sys.exit(any(one["wrong"] for one in found))


if __name__ == "__main__":
    main()
