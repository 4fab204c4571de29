"""Speed and memory of writing a steered checkpoint, beside cp of the unsteered one.

    python benchmarks/checkpoint.py [--runs 5] [--layers 120]

A random llama of SmolLM2's width and more layers, in bfloat16 shards of 100 MB, gets 33 shifts and 33 clamps a layer.
Each turn runs in a fresh process, whose memory beyond Python's imports (and a first small checkpoint) is measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from transformers import AutoConfig
from npti_export.compiler.exact import compile_exact
from npti_export.export.checkpoint import directory_weights, plan_checkpoint, write_checkpoint
from npti_export.rule import SteeringRule

def anonymous(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 1024

def write(base, out):
    config = AutoConfig.from_pretrained(base)
    shape = (config.num_hidden_layers, config.intermediate_size)
    rng = np.random.default_rng(0)
    shift, clamp = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for layer in range(shape[0]):
        order = rng.permutation(shape[1])
        shift[layer, order[:33]], clamp[layer, order[33:66]] = 0.3, True
    program = compile_exact(SteeringRule(shift, clamp), 4)
    started = time.perf_counter()
    out.mkdir()
    plan = plan_checkpoint(config, directory_weights(base), program)
    write_checkpoint(plan, out)
    for file in out.iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started, plan.nbytes

small, base, out = map(Path, sys.argv[1:])
write(small, out.with_name(out.name + "-small"))
before = anonymous("VmHWM:")
seconds, nbytes = write(base, out)
print(json.dumps({"seconds": seconds, "bytes": nbytes, "beyond": anonymous("VmHWM:") - before}))
"""


def random_llama(folder, layers):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=120)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        small, base = random_llama(place / "small", 1), random_llama(place / "base", arguments.layers)
        size = sum(file.stat().st_size for file in base.iterdir())
        ratios, beyond = [], []
        for run in range(arguments.runs + 1):
            target = place / f"copy{run}"
            started = time.perf_counter()
            subprocess.run(["cp", "-r", base, target], check=True)
            subprocess.run(["sync", *target.iterdir()], check=True)
            copied = size / (time.perf_counter() - started)
            out = place / f"out{run}"
            done = subprocess.run([sys.executable, "-c", CHILD, small, base, out], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            subprocess.run(["rm", "-r", target, out, place / f"out{run}-small"], check=True)
            if run:
                ratios.append(found["bytes"] / found["seconds"] / copied)
                beyond.append(found["beyond"])
        print(f"{size / 1e6:.0f} MB in {len(list(base.glob('*.safetensors')))} shards -> {found['bytes'] / 1e6:.0f} MB")
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{median:.2f} times the bytes a second of cp and fsync ({low:.2f} to {high:.2f})")
        print(
            f"memory beyond imports and a small checkpoint: {statistics.median(beyond):.0f} MB, mapped files included"
        )


if __name__ == "__main__":
    main()
