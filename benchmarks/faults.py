"""Every command that writes, broken on purpose: kills, full and failing disks, vanishing and damaged files.

On tiny models, so that a run takes about a second of a core: each is a fork of this process, which has imported
everything. After each fault: nothing half-written under the output's name, no broken file in the cache, no traceback,
no signal but ours, no hang; and running the same command again gives the bytes of a run that nobody disturbed.

    python benchmarks/faults.py --kills 500 --others 20 --seed 0

A stopped run goes on (``--out FILE``, JSON lines; each trial draws from a seed of its own). Exit code 1 if anything
was wrong. Full disks need root (a small tmpfs is mounted); without it they are left out, and the table says so.
The kinds of faults are in ``faulting/kinds.py``.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# before numpy is imported: a process that is forked may have no threads
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faulting import failing, inputs
from faulting.endings import MAIN
from faulting.kinds import FULL, KINDS
from faulting.place import Place
from faulting.setting import Setting
from faulting.table import kills_of, table

OUT = Path(__file__).parent / "out" / "faults.jsonl"


@contextlib.contextmanager
def room(setting, kind):
    """A folder for a trial; on a disk of its own of two outputs' size for those that fill it."""
    folder = Path(tempfile.mkdtemp(dir=setting.root))
    folder.chmod(0o755)
    size = 4 * setting.model.stat().st_size
    mounted = kind == FULL
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


def left_out(setting, kinds):
    """Kinds that this machine cannot do, and why."""
    skipped = {}
    if FULL in kinds:
        try:
            with room(setting, FULL):
                pass
        except (OSError, subprocess.CalledProcessError):
            skipped[FULL] = "no disk can be mounted here"
    if "refused in C" in kinds and not failing.can_filter():
        skipped["refused in C"] = "no such filter here"
    return skipped


def trial(setting, kind, number, seed):
    draw = random.Random(f"{seed} {kind} {number}")
    one = KINDS[kind]
    setting.whole(one.ending)
    inputs.prepare(setting, one.reads)
    with room(setting, kind) as folder:
        place = Place(setting, folder, one.ending)
        met, after = one.trial(place, draw)
        return {"kind": kind, "number": number, "seed": seed, "met": met, "after": after, "kills": kills_of(kind, met),
                "wrong": place.wrong, "said": place.said}  # fmt: skip


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="of the main job")
    parser.add_argument("--others", type=int, default=20, help="trials of each other kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON lines, gone on with")
    return parser.parse_args()


def main():
    options, began = parsed(), time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.is_file() else []
    found = [one for one in map(json.loads, lines) if one["seed"] == options.seed]
    done = {(one["kind"], one["number"]) for one in found}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, Setting(Path(folder)) as setting:
        setting.whole(MAIN)
        skipped = left_out(setting, options.kinds)
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
        seconds = setting.whole(MAIN).seconds
    print(f"an undisturbed run of the main job takes {seconds:.2f} s here; {time.monotonic() - began:.0f} s for all")
    table(found, KINDS, skipped)
    sys.exit(any(one["wrong"] for one in found))


if __name__ == "__main__":
    main()
