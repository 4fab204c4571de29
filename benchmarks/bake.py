"""Speed and memory of baking, beside cp of the same file.

    python benchmarks/bake.py [--runs 7] [--copies 10] [--folder DIR] [--large] [--width 14336]

Bakes a rule of the default recipe's size (random neurons) into the default model and into a file ten times larger with
the same tensors repeated as more layers, or with --large into a file with the tensors of an 8B model in Q4_K and Q6_K
(5 GB of random blocks; needs 30 GB free), in fresh processes: so the peak is that of baking, and what Python's imports
take is measured by a process that only imports. Prints medians of pairs run in turn, and of their ratios. cp writes to
the page cache; baking as the command does it also fsyncs, so small files are shown with and without, large ones with.
Before a cold run the source is dropped from the page cache, and the table says how much of it mincore still sees there.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
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
from npti_export.gguf.ggml import ggml
from npti_export.gguf.reader import read_gguf
from npti_export.rule import SteeringRule
ggml()

def peak():  # ru_maxrss would count the parent's memory at the fork, too
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

imports = peak()
if len(sys.argv) > 1:
    base, out, count, sync = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "sync"
    layers, width = int(sys.argv[5]), int(sys.argv[6])  # given, so that the base is not read before the clock starts
    rng = np.random.default_rng(0)
    shift, clamp = np.zeros((layers, width), np.float32), np.zeros((layers, width), bool)
    for layer in range(layers):
        order = rng.permutation(width)
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
    print(json.dumps(
        {"seconds": seconds, "beyond": peak() - imports, "peak": peak(), "bytes": out.stat().st_size}
    ))
"""
NEURONS = 34  # shifts a layer, and as many clamps: about what the default recipe takes


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


def large(target, width, layers=32, hidden=4096, vocabulary=128256):
    """The tensors of Llama 3 8B in llama.cpp's Q4_K_M mixture, written in a stream: random blocks with small scales.

    There is no tokenizer, and the blocks repeat every 48 MB or so: neither matters to what moves them.
    """
    import numpy as np

    from npti_export.gguf.blocks import block_shape, type_id_of
    from npti_export.gguf.writer import NewTensor, encode_header, encode_uint32, encode_value, lay_out

    rng = np.random.default_rng(0)
    pools = {}
    for name, scales in (("Q4_K", (0, 2)), ("Q6_K", (208,))):  # as in ggml-common.h
        _, nbytes = block_shape(type_id_of(name), name)
        blocks = rng.integers(0, 256, (1 << 18, nbytes), dtype=np.uint8)
        for offset in scales:
            scale = rng.uniform(1e-5, 1e-4, len(blocks)).astype(np.float16)
            blocks[:, offset : offset + 2] = scale[:, None].view(np.uint8)
        pools[type_id_of(name)] = blocks.tobytes()
    pools[0] = np.ones(hidden, np.float32).tobytes()
    tensors = []

    def add(name, row, rows, kind):
        block, nbytes = block_shape(type_id_of(kind), kind)
        shape = (row,) if rows == 1 else (row, rows)
        tensors.append(NewTensor(f"{name}.weight", shape, type_id_of(kind), row // block * nbytes * rows))

    add("token_embd", hidden, vocabulary, "Q4_K")
    for layer in range(layers):
        # llama.cpp, llama_tensor_get_type: more bits for half of these two, use_more_bits
        finer = "Q6_K" if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2 else "Q4_K"
        add(f"blk.{layer}.attn_norm", hidden, 1, "F32")
        add(f"blk.{layer}.ffn_norm", hidden, 1, "F32")
        for name, rows, kind in (("q", hidden, "Q4_K"), ("k", hidden // 4, "Q4_K"), ("v", hidden // 4, finer)):
            add(f"blk.{layer}.attn_{name}", hidden, rows, kind)
        add(f"blk.{layer}.attn_output", hidden, hidden, "Q4_K")
        add(f"blk.{layer}.ffn_gate", hidden, width, "Q4_K")
        add(f"blk.{layer}.ffn_up", hidden, width, "Q4_K")
        add(f"blk.{layer}.ffn_down", width, hidden, finer)
    add("output_norm", hidden, 1, "F32")
    add("output", hidden, vocabulary, "Q6_K")
    keys = [("general.architecture", encode_value("llama"))]
    for key, value in (("block_count", layers), ("embedding_length", hidden), ("feed_forward_length", width)):
        keys.append((f"llama.{key}", encode_uint32(value)))
    placed = lay_out(tensors, 32)
    header = encode_header(3, keys, placed, 32)
    with target.open("wb") as stream:
        stream.write(header)
        for tensor in placed:
            stream.seek(len(header) + tensor.offset)
            pool, left = pools[tensor.type_id], tensor.nbytes
            while left:
                left -= stream.write(memoryview(pool)[:left])
        stream.truncate(-(-stream.tell() // 32) * 32)


def child(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def copy(source, target, sync):
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    if sync:
        handle = os.open(target, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - started


def cached_share(path):
    """The share of a file's pages that are in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        seen = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), seen)
        del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(one & 1 for one in seen) / pages


def prepare(source, target, cold):
    """The same start for both of a pair: nothing there, no one's dirty pages, the source in the page cache or not.

    Returns:
        The share of the source that is in the page cache.
    """
    target.unlink(missing_ok=True)
    os.sync()
    with source.open("rb") as stream:
        if cold:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while stream.read(1 << 24):
                pass
    return cached_share(source)


def series(source, folder, runs, sync, cold):
    """Pairs of cp and bake of one file."""
    from npti_export.gguf.reader import read_gguf

    header = read_gguf(source)
    shape = [header.require_int(f"llama.{key}") for key in ("block_count", "feed_forward_length")]
    pairs, shares = [], []
    for _ in range(runs):
        shares.append(prepare(source, folder / "copy", cold))
        copied = copy(source, folder / "copy", sync)
        (folder / "copy").unlink()
        shares.append(prepare(source, folder / "out", cold))
        baked = child(source, folder / "out", NEURONS, "sync" if sync else "plain", *shape)
        pairs.append((copied, baked))
        (folder / "out").unlink()
    return pairs, max(shares) if cold else min(shares)


def report(name, source, pairs, sync, cold, share):
    size = source.stat().st_size
    ratios = [(baked["bytes"] / baked["seconds"]) / (size / copied) for copied, baked in pairs]
    print(
        f"| {size / 1e6:.0f} MB, {name} | {'cold' if cold else 'warm'}, {share:.0%} cached | {'yes' if sync else 'no'} "
        f"| {statistics.median(copied for copied, _ in pairs):.3f} s "
        f"| {statistics.median(baked['seconds'] for _, baked in pairs):.3f} s "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {max(baked['beyond'] for _, baked in pairs):.0f}, {max(baked['peak'] for _, baked in pairs):.0f} |",
        flush=True,
    )


def main():
    from npti_export.models import default_model_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the temporary folder goes")
    parser.add_argument("--large", action="store_true", help="the file of an 8B model instead of the small ones")
    parser.add_argument("--width", type=int, default=14336, help="of the large file's MLPs")
    arguments = parser.parse_args()
    if arguments.large and shutil.disk_usage(arguments.folder).free < 30e9:
        parser.error(f"{arguments.folder}: less than 30 GB are free; give another --folder")
    print("| file | source | fsync | cp | bake | bytes written a second, bake / cp | MB beyond imports, in all |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        if arguments.large:
            files = [(f"8B, n_ff {arguments.width}", folder / "large.gguf")]
            large(files[0][1], arguments.width)
        else:
            files = [
                ("default", folder / "default.gguf"),
                (f"{arguments.copies} times the layers", folder / "big.gguf"),
            ]
            shutil.copyfile(default_model_path(), files[0][1])  # a file of its own can be dropped from the cache
            larger(default_model_path(), files[1][1], arguments.copies)
        for name, source in files:
            for sync in (True,) if arguments.large else (False, True):
                for cold in (False, True):
                    pairs, share = series(source, folder, arguments.runs, sync, cold)
                    report(name, source, pairs, sync, cold, share)


if __name__ == "__main__":
    main()
