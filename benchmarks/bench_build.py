"""Speed and memory of `npti-export bench build`, against a light stub of an endpoint in a process of its own.

python benchmarks/bench_build.py [--items 180000] [--marks 20000 60000 …] [--bad 0.2] [--judge] [--profile FILE]

Prints kept items a second and resident memory when so many are kept, and what the folder holds. A second run on the
finished folder is timed too: that is what it costs to go on. `--profile` writes cProfile's statistics.
"""

import argparse
import cProfile
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil

from npti_export import bench
from npti_export.bench.definition import read_definition
from npti_export.bench.making.builder import Options, build
from npti_export.bench.making.folder import Folder
from npti_export.bench.making.judge import Judge
from npti_export.bench.making.plan import Plan
from npti_export.generators.endpoint import Endpoint, EndpointSettings

say = partial(print, flush=True)
STUB = Path(__file__).parents[1] / "tests" / "openai_stub.py"


class Marks:
    """A display that prints a row at each mark."""

    def __init__(self, marks):
        self._left, self.rows = sorted(marks), []
        self._begun = self._last = time.perf_counter()
        self._kept = 0
        say(f"{'kept':>8} {'kept/s':>8} {'seen/s':>8} {'RSS MiB':>8}")

    def update(self, tally):
        if not self._left or tally.kept < self._left[0]:
            return
        now, memory = time.perf_counter(), psutil.Process().memory_info().rss / 2**20
        rate = (tally.kept - self._kept) / (now - self._last)
        seen = (tally.kept + tally.rejected) / (now - self._begun)
        say(f"{tally.kept:8} {rate:8.0f} {seen:8.0f} {memory:8.0f}")
        self.rows.append((tally.kept, rate, memory))
        self._kept, self._last = tally.kept, now
        self._left.pop(0)

    def note(self, text):
        say(text)


def run(plan, folder, url, arguments, marks):
    settings = EndpointSettings(url, plan.model, concurrency=arguments.concurrency)
    generator = Endpoint(settings, say)
    judge = Judge(Endpoint(settings, say), plan.definition) if plan.judge else None
    started = time.perf_counter()
    report = build(plan, folder, generator, judge, Options(), Marks(marks))
    return time.perf_counter() - started, report


def measure(url, arguments, folder):
    definition = read_definition(Path(bench.__file__).parent / "data" / "extraversion")
    test = arguments.items // 10
    sizes = (("search", arguments.items - test), ("test", test))
    plan = Plan("questions", definition, sizes, "stub", judge="stub" if arguments.judge else "")
    say(f"resident before: {psutil.Process().memory_info().rss / 2**20:.0f} MiB")
    profile = cProfile.Profile() if arguments.profile else None
    if profile:
        profile.enable()
    seconds, report = run(plan, Folder(folder), url, arguments, arguments.marks)
    if profile:
        profile.disable()
        profile.dump_stats(arguments.profile)
    kept = sum(report["kept"].values())
    say(f"{kept} kept in {seconds:.0f} s: {kept / seconds:.0f}/s, writing the files included")
    say(f"rejected: {report['rejected']}; complete: {report['complete']}; rounds: {report['rounds']}")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            say(f"  {path.relative_to(folder)}: {path.stat().st_size / 2**20:.1f} MiB")
    seconds, _ = run(plan, Folder(folder), url, arguments, [])
    say(f"run again when finished: {seconds:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=180_000)
    parser.add_argument("--marks", type=int, nargs="*", default=[20_000, 60_000, 120_000, 175_000])
    parser.add_argument("--bad", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--profile", type=Path)
    arguments = parser.parse_args()
    say(
        f"{os.cpu_count()} cores, {arguments.concurrency} requests at once, {arguments.bad:.0%} of items not to be kept"
    )
    command = [sys.executable, STUB, "--bad", str(arguments.bad)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stub:
        try:
            url = stub.stdout.readline().strip()
            with tempfile.TemporaryDirectory() as folder:
                measure(url, arguments, Path(folder) / "bench")
        finally:
            stub.stdin.close()


if __name__ == "__main__":
    main()
