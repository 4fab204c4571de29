"""The main job from a warm install, whole process: seconds by stage and peak memory; and --help.

    python benchmarks/main_job.py [--trait agreeableness+] [--help-runs 15]

Nothing is taken from a cache of earlier identifications. The baseline is a plain greedy generation of the same prompts
by the same model in transformers, with nothing listened to and nothing counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "from npti_export.cli import main; main()"]

BASELINE = """
import sys, time
from npti_export.bench import load_bench
from npti_export.identify.collect import contrast_prompts
from npti_export.models import resolve_model
from npti_export.recipe import select_recipe
from npti_export.runtimes.transformers import TransformersRuntime
source = resolve_model(None)
recipe = select_recipe(None, source.fingerprint)
bench = load_bench(sys.argv[1][:-1])
runtime = TransformersRuntime(source)
questions = bench.search()
settings = recipe.identify
started = time.perf_counter()
half = settings.batch_size // 2
tokens = 0
for start in range(0, len(questions), half):
    batch = questions[start:start + half]
    prompts = [p for sign in "+-" for p in contrast_prompts(runtime, bench, batch, sign, recipe, start)]
    done = runtime.generate(
        prompts, max_new_tokens=settings.max_new_tokens, repetition_penalty=settings.repetition_penalty
    )
    tokens += sum(len(one.response) for one in done)
seconds = time.perf_counter() - started
print(seconds, tokens)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trait", default="agreeableness+")
    parser.add_argument("--help-runs", type=int, default=15)
    arguments = parser.parse_args()
    times = []
    for _ in range(arguments.help_runs):
        started = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    print(f"--help: median {statistics.median(times):.3f} s, worst {max(times):.3f} s of {len(times)}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        started = time.perf_counter()
        subprocess.run(
            [*COMMAND, "--trait", arguments.trait, "--out", f"{folder}/m.gguf", "--report", str(report)],
            check=True,
            capture_output=True,
            env={**os.environ, "NPTI_CACHE": f"{folder}/cache"},
        )
        whole = time.perf_counter() - started
        found = json.loads(report.read_text())
    print(f"main job: {whole:.1f} s for the whole process, peak {found['peak_rss_mb']:.0f} MB")
    print("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found["seconds"].items()))
    done = subprocess.run([sys.executable, "-c", BASELINE, arguments.trait], check=True, capture_output=True, text=True)
    seconds, tokens = map(float, done.stdout.split()[-2:])
    ratio = found["seconds"]["identify"] / seconds
    print(f"identify / plain generation of the same answers ({tokens:.0f} tokens, {seconds:.1f} s): {ratio:.2f}")


if __name__ == "__main__":
    main()
