"""Speed and memory of baking, beside cp of the same file.

    python benchmarks/bake.py [--runs 7] [--copies 10]

Bakes a rule of the default recipe's size (random neurons) into the default model and into a file ten times larger with
the same tensors repeated as more layers, in fresh processes: so the peak is that of baking, and what Python's imports
take is measured by a process that only imports. Prints medians and ratios. cp writes to the page cache; baking as the
command does it also fsyncs, so both are shown with and without.
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

CHILD = """
import json, sys, time
from pathlib import Path
import gguf.quants
import numpy as np
from npti_export.compiler.exact import compile_exact
from npti_export.export.gguf import check_base, plan_bake, write_bake
from npti_export.files import atomic_output
from npti_export.gguf import blocks
from npti_export.gguf.reader import read_gguf
from npti_export.rule import SteeringRule
blocks._ggml()

def peak():  # ru_maxrss would count the parent's memory at the fork, too
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

imports = peak()
if len(sys.argv) > 1:
    base, out, count, sync = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "sync"
    layers = read_gguf(base).get("llama.block_count")
    rng = np.random.default_rng(0)
    shift, clamp = np.zeros((layers, 1536), np.float32), np.zeros((layers, 1536), bool)
    for layer in range(layers):
        order = rng.permutation(1536)
        shift[layer, order[:count]], clamp[layer, order[count:2 * count]] = 0.3, True
    rule = SteeringRule(shift, clamp)
    started = time.perf_counter()
    header = read_gguf(base)
    check_base(header)
    plan = plan_bake(header, compile_exact(rule, 4), {}, "0" * 64)
    if sync:
        with atomic_output(out, force=True) as temporary:
            write_bake(plan, temporary)
    else:
        write_bake(plan, out)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "beyond": peak() - imports, "bytes": out.stat().st_size}))
"""


def larger(source, target, copies):
    """The same model with its layers repeated: a valid GGUF of about ``copies`` times the size."""
    from gguf import GGUFReader, GGUFWriter
    from gguf.constants import GGUFValueType

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    layers = reader.fields["llama.block_count"].contents()
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = layers * copies if key == "llama.block_count" else field.contents()
        sub = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], sub_type=sub)
    for copy in range(copies):
        for tensor in reader.tensors:
            parts = tensor.name.split(".")
            if parts[0] == "blk":
                parts[1] = str(int(parts[1]) + copy * layers)
            elif copy:
                continue
            writer.add_tensor(".".join(parts), tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def child(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def copy(source, target, sync):
    target.unlink(missing_ok=True)
    os.sync()  # no one else's dirty pages, and the same start for both
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    if sync:
        handle = os.open(target, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - started


def main():
    from npti_export.models import default_model_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--copies", type=int, default=10)
    arguments = parser.parse_args()
    print("| file | fsync | cp | bake | ratio of bytes written per second, bake / cp | MB beyond imports |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = Path(folder)
        big = folder / "big.gguf"
        larger(default_model_path(), big, arguments.copies)
        for name, source in (("default", default_model_path()), (f"{arguments.copies} times the layers", big)):
            for sync in (False, True):
                ratios, copies, bakes, memory = [], [], [], []
                for _ in range(arguments.runs):
                    copied = copy(source, folder / "copy", sync)
                    (folder / "out").unlink(missing_ok=True)
                    os.sync()
                    baked = child(source, folder / "out", 34, "sync" if sync else "plain")
                    copies.append(copied)
                    bakes.append(baked["seconds"])
                    memory.append(baked["beyond"])
                    ratios.append((baked["bytes"] / baked["seconds"]) / (source.stat().st_size / copied))
                size = f"{source.stat().st_size / 1e6:.0f} MB, {name}"
                print(
                    f"| {size} | {'yes' if sync else 'no'} | {statistics.median(copies):.3f} s "
                    f"| {statistics.median(bakes):.3f} s | {statistics.median(ratios):.2f} | {max(memory):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
