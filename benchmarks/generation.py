"""Generation speed of a steered file over its base, or of a ragged file over the uniform one, in llama.cpp.

    npti-export --trait agreeableness+ --out model.gguf && npti-export strip model.gguf --out base.gguf
    python benchmarks/generation.py model.gguf base.gguf [--runs 7] [--threads 1]
    npti-export --from model.gguf --layout ragged --out ragged.gguf
    python benchmarks/generation.py ragged.gguf model.gguf

The two take turns; the ratio is the median of the pairs'. Extra width and bytes say what to expect.
"""

import argparse
import statistics
import time
from pathlib import Path

from npti_export.gguf.reader import mlp_widths, read_gguf
from npti_export.runtimes.llamacpp.context import Row, Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime


def tokens_per_second(runtime, count=96):
    context = runtime.context(512, 1)
    context.clear()
    context.decode([Row(token, at, 0, at == 39) for at, token in enumerate(range(20, 60))])
    started = time.perf_counter()
    for step in range(count):
        context.decode([Row(100 + step, 40 + step, 0, True)])
    return count / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steered", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    settings = Settings() if arguments.threads is None else Settings(threads=arguments.threads)
    steered, base = (LlamaCppRuntime(path, settings) for path in (arguments.steered, arguments.base))
    pairs = [(tokens_per_second(steered), tokens_per_second(base)) for _ in range(arguments.runs + 1)][1:]
    sizes = [path.stat().st_size for path in (arguments.steered, arguments.base)]
    widths = [statistics.mean(mlp_widths(read_gguf(path))) for path in (arguments.steered, arguments.base)]
    print(f"MLP width {widths[1]:g} -> {widths[0]:g} on average, bytes x{sizes[0] / sizes[1]:.3f}")
    medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
    print(f"steered {medians[0]:.0f}, base {medians[1]:.0f} tokens/s")
    print(f"ratio {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
