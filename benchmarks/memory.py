"""Memory over many small batches of identification, as a run of hours makes them: it must not grow.

What a batch does in the main job: two personas answer a question, neurons are counted, the sums are saved. On a tiny
model, in both runtimes, each in a process of its own. The slope is a least-squares line over the second half.

    python benchmarks/memory.py --batches 10000
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from families import cut_tokenizer, write_tiny

RUNTIMES = ("llama.cpp", "transformers")
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident():
    """Resident memory of this process, KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE // 1024


def opened(name, model):
    from npti_export.models import gguf_source

    source = gguf_source(model)
    if name == "llama.cpp":
        from npti_export.runtimes.llamacpp.context import Settings
        from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

        return source, LlamaCppRuntime(model, Settings(threads=1), source=source, sequences=2)
    import torch

    from npti_export.runtimes.transformers import TransformersRuntime

    torch.set_num_threads(1)
    return source, TransformersRuntime(source, device="cpu", dtype="float32")


def measured(name, model, batches, folder):
    """Resident KiB before the first batch and after each."""
    from npti_export.bench import load_bench
    from npti_export.identify.collect import run_batch
    from npti_export.recipe import load_recipe
    from npti_export.stats import ContrastStats, save_stats

    source, runtime = opened(name, model)
    bench, recipe = load_bench("extraversion"), load_recipe("npti")
    identify = recipe.identify.model_copy(update={"max_new_tokens": 8, "batch_size": 2})
    recipe = recipe.model_copy(update={"identify": identify})
    questions = bench.search(0, 0)
    stats = ContrastStats.empty(source.shape.layers, source.shape.width)
    found = [resident()]
    for number in range(batches):
        at = number % len(questions)
        stats = stats.absorb(run_batch(runtime, bench, questions[at : at + 1], at, recipe))
        save_stats(Path(folder) / "state.safetensors", stats, {"batches": number + 1})
        found.append(resident())
    return found


def _child(name, model, batches, folder, pipe):
    pipe.send(measured(name, model, batches, folder))


def row(name, found, marks, seconds):
    half = found[len(found) // 2 :]
    slope = np.polyfit(np.arange(len(half)), half, 1)[0] * 1000
    marked = " ".join(f"{found[mark] / 1024:9.1f}" for mark in marks)
    return f"{name:14} {marked} {slope:12.1f} {seconds:8.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    options = parser.parse_args()
    if options.batches < 20:
        parser.error("--batches: give 20 or more")
    from npti_export.models import default_model_path

    marks = [max(1, options.batches * tenth // 10) for tenth in (1, 5, 10)]
    print(f"{'MB after batch':14} {' '.join(f'{mark:9}' for mark in marks)} {'KiB per 1000':>12} {'seconds':>8}")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        model = Path(folder) / "tiny.gguf"
        write_tiny(model, cut_tokenizer(default_model_path()), "F32")
        for name in options.runtimes:
            began = time.monotonic()
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_child, args=(name, model, options.batches, folder, theirs))
            process.start()
            theirs.close()
            print(row(name, ours.recv(), marks, time.monotonic() - began), flush=True)
            process.join()


if __name__ == "__main__":
    main()
