"""Memory over many small batches of identification, as a run of hours makes them: it must not grow.

What `identify` does: two personas answer a question, neurons are counted, the sums are saved, the overlap is forecast,
progress is drawn and logged. On a tiny model, in both runtimes and in llama.cpp on Ray (one worker, and the process
that drives it), each in processes of its own. The slope is a least-squares line over the second half.

    python benchmarks/memory.py --batches 10000
    python benchmarks/memory.py --batches 1000 --runs "ray"
"""

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import psutil
from families import cut_tokenizer, write_tiny

RUNS = ("llama.cpp", "transformers", "ray")
TRAIT = "extraversion"


class Enough(Exception):  # noqa: N818
    """So many batches are done; more are there, as near the end the selection would settle."""


def watched(batches, folder, processes):
    """The command line's progress, which draws and logs; after each batch the resident bytes of ``processes()``.

    Raises :class:`Enough` behind the last one.
    """
    from rich.console import Console

    from npti_export.cli.long_runs import LOGGER
    from npti_export.cli.progress_bars import RichProgress

    class Watched(RichProgress):
        def __init__(self, console):
            super().__init__(console)
            self.done, self.seen = 0, None

        def advance(self, steps, tokens=0):
            super().advance(steps, tokens)
            if tokens and self.done < batches:
                found = [one.memory_info().rss for one in processes()]
                if self.seen is None:
                    self.seen = np.full((batches, len(found)), -1.0)  # all of it now: it is not to grow
                self.seen[self.done] = found
                self.done += 1
            if self.done == batches:
                raise Enough

    LOGGER.addHandler(logging.FileHandler(folder / "log"))
    LOGGER.setLevel(logging.INFO)
    return Watched(Console(file=(folder / "drawn").open("w", encoding="utf-8"), force_terminal=True))


def job(batches):
    """A bench of twice as many questions, and a recipe that asks one a batch and forecasts the overlap after each."""
    from npti_export.bench import load_bench
    from npti_export.recipe import load_recipe

    bench = load_bench(TRAIT)
    few = bench.search(0, 0)
    many = [replace(few[at % len(few)], text=f"{few[at % len(few)].text} ({at})") for at in range(2 * batches)]
    settings = ["identify.batch_size=2", "identify.max_new_tokens=8", "identify.floor=2", "identify.overlap=1"]
    return replace(bench, questions=tuple(many)), load_recipe("npti", [*settings, "select.at_least=20"])


def in_one_process(name, model, batches, folder):
    from npti_export.identify.collect import collect
    from npti_export.models import gguf_source

    source, (bench, recipe), this = gguf_source(model), job(batches), psutil.Process()

    def opened():
        if name == "llama.cpp":
            from npti_export.runtimes.llamacpp.context import Settings
            from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime

            return LlamaCppRuntime(model, Settings(threads=1), source=source, sequences=2)
        import torch

        from npti_export.runtimes.transformers import TransformersRuntime

        torch.set_num_threads(1)
        return TransformersRuntime(source, device="cpu", dtype="float32")

    with watched(batches, folder, lambda: [this]) as progress, suppress(Enough):
        collect(opened, source, bench, recipe, progress, dtype="tiny", device="cpu", cache=folder)
    return progress.seen


def on_ray(_name, model, batches, folder):
    from npti_export.distribute.plan import Distribution
    from npti_export.distribute.spread import Request, answered
    from npti_export.identify.profiles import Place
    from npti_export.loader import Models, RuntimeSettings, Timings
    from npti_export.models import gguf_source
    from npti_export.progress import Silent

    source, (bench, recipe), this, workers = gguf_source(model), job(batches), psutil.Process(), []

    def processes():
        if not workers:
            found = this.children(recursive=True)
            workers.extend(one for one in found if one.name().startswith("ray::Worker"))
        return [this, *workers]

    settings = RuntimeSettings(threads=1, weights="file")
    models = Models(source, settings, Timings(), Silent(), verifies=False, sequences=2)
    place = Place(models.fast, source, models.dtype(), models.device(), folder)
    request = Request({TRAIT: bench}, {TRAIT: recipe}, {}, recipe, str(model))
    with (
        watched(batches, folder, processes) as progress,
        suppress(Enough),
        answered(request, Distribution(1), place, models, progress),
    ):
        pass
    return progress.seen


def _child(name, model, batches, folder, pipe):
    found = (on_ray if name == "ray" else in_one_process)(name, model, batches, Path(folder))
    assert (found > 0).all(), "the selection settled before"
    pipe.send(found / 1024)


def row(name, found, marks, seconds):
    half = found[len(found) // 2 :]
    slope = np.polyfit(np.arange(len(half)), half, 1)[0] * 1000
    marked = " ".join(f"{found[mark - 1] / 1024:9.1f}" for mark in marks)
    return f"{name:14} {marked} {slope:12.1f} {seconds:8.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
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
        for name in options.runs:
            began = time.monotonic()
            cache = Path(folder, name)
            cache.mkdir()
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_child, args=(name, model, options.batches, cache, theirs))
            process.start()
            theirs.close()
            columns, seconds = ours.recv().T, time.monotonic() - began
            names = [name] if len(columns) == 1 else [f"{name}: driver", *[f"{name}: worker"] * (len(columns) - 1)]
            for each, found in zip(names, columns, strict=True):
                print(row(each, found, marks, seconds), flush=True)
            process.join()


if __name__ == "__main__":
    main()
