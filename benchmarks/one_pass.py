"""What traits share that are identified in one command: five traits one after the other, against all at once.

    python benchmarks/one_pass.py [--questions 8] [--pairs 3] [--model FILE]

Each way starts from an empty cache and counts neurons under both poles of every trait, so ten poles. Questions,
personas and answers are each trait's own; what is shared is the start of the program, the load of the model and its
conversion, so the saving is a number of seconds for each trait but the first, however many questions there are.
Processor seconds are printed beside the clock's: they say the same on a busy machine.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import say

from npti_export.traits import FACETS

COMMAND = [sys.executable, "-c", "from npti_export.cli import main; main()"]


def identified(traits, options, folder):
    """Seconds, and processor seconds, of the commands: one for each list of traits."""
    began, spent = time.perf_counter(), _spent()
    for number, some in enumerate(traits):
        command = [*COMMAND, "identify", "--recipe", "npti", "--until", "all"]
        command += ["--questions", str(options.questions), "--out", str(folder / f"{number}")]
        command += [part for trait in some for part in ("--trait", trait)]
        command += ["--model", options.model] if options.model else []
        environment = {**os.environ, "NPTI_CACHE": str(folder / f"cache{number}")}
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began, _spent() - spent


def _spent():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8, help="of each trait")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--model")
    options = parser.parse_args()
    traits = list(FACETS)
    ways = {"one command for each": [[trait] for trait in traits], "one command for all": [traits]}
    took = {way: [] for way in ways}
    for _ in range(options.pairs):
        for way, commands in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                took[way].append(identified(commands, options, Path(folder)))
    for way, found in took.items():
        clock, processor = (statistics.median(one) for one in zip(*found, strict=True))
        say(f"{way:22} {clock:6.1f} s, {processor:6.1f} s of processors")
    for what, place in (("clock", 0), ("processors", 1)):
        each, all_ = ([one[place] for one in found] for found in took.values())
        saved = statistics.median(one - other for one, other in zip(each, all_, strict=True)) / (len(traits) - 1)
        ratio = statistics.median(other / one for one, other in zip(each, all_, strict=True))
        say(f"{what}: {saved:.1f} s saved for each trait but the first; all at once take {ratio:.2f} of the time")


if __name__ == "__main__":
    main()
