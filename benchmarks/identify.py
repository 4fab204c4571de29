"""Identification in llama.cpp against the same stage in transformers, and what capturing and sharing cost or save.

    python benchmarks/identify.py [--questions 16] [--tokens 64] [--pairs 3] [--half-billion]
        [--dtype float32] [--weights file] [--part transformers|llama.cpp]

Both runtimes answer the same questions under the same personas, greedy, and count the gates of their answers; stages
take turns, ratios are medians of the pairs'. ``--half-billion`` writes a random model with the shape and tensor types
of a 0.5B qwen2 in Q4_K_M (random weights never end an answer, so both decode the same number of tokens).

Capture: the same prompts decoded in the same batch by a context without a callback. Sharing: the same stage with every
prompt processed whole.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from npti_export.bench import load_bench
from npti_export.identify.collect import contrast_prompts
from npti_export.identify.profiles import Place, identified
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import default_model_path, gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.runtimes.transformers import TransformersRuntime

TRAIT = "extraversion"


def half_billion(folder):
    """24 layers of 4,864 neurons; rows of 896 are no multiple of 256, where llama.cpp falls back to Q5_0."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

    from npti_export.gguf.blocks import quantise

    hidden, width, layers, heads, kv_heads = 896, 4864, 24, 14, 2
    fields = GGUFReader(default_model_path()).fields
    rng = np.random.default_rng(0)
    path = Path(folder) / "half-billion.gguf"
    writer = GGUFWriter(path, "qwen2")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    writer.add_name("random 0.5B")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(fields["tokenizer.ggml.token_type"].contents())
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(fields["tokenizer.chat_template"].contents())

    def matrix(name, rows, columns, kind):
        values = (rng.standard_normal((rows, columns), np.float32) / np.sqrt(columns)).astype(np.float32)
        kind = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantise(values, int(kind)), raw_dtype=kind)

    def vector(name, size, mean=1.0):
        writer.add_tensor(name, (mean + 0.05 * rng.standard_normal(size)).astype(np.float32))

    matrix("token_embd.weight", len(tokens), hidden, "Q8_0")
    for layer in range(layers):
        blk, size = f"blk.{layer}", hidden // heads
        vector(f"{blk}.attn_norm.weight", hidden)
        for name, rows, kind in (("q", hidden, "Q5_0"), ("k", kv_heads * size, "Q5_0"), ("v", kv_heads * size, "Q8_0")):
            matrix(f"{blk}.attn_{name}.weight", rows, hidden, kind)
            vector(f"{blk}.attn_{name}.bias", rows, 0.0)
        matrix(f"{blk}.attn_output.weight", hidden, hidden, "Q5_0")
        vector(f"{blk}.ffn_norm.weight", hidden)
        matrix(f"{blk}.ffn_gate.weight", width, hidden, "Q5_0")
        matrix(f"{blk}.ffn_up.weight", width, hidden, "Q5_0")
        matrix(f"{blk}.ffn_down.weight", hidden, width, "Q6_K" if layer % 2 else "Q4_K")
    vector("output_norm.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stage(runtime, source, recipe):
    """Seconds and response tokens of one whole identification."""
    started = time.perf_counter()
    place = Place(lambda: runtime, source, "any", "any", None)
    _, profile = identified(place, load_bench(TRAIT), recipe, Silent())
    return time.perf_counter() - started, sum(profile.origin["tokens"].values())


def against_transformers(source, recipe, sequences, pairs, weights, dtype):
    torch_runtime = TransformersRuntime(source, dtype=dtype)
    with Models(
        source, RuntimeSettings(weights=weights), Timings(), Silent(), verifies=False, sequences=sequences
    ) as models:
        started = time.perf_counter()
        llama = models.fast()
        print(f"  llama.cpp computes in {models.dtype()}, ready after {time.perf_counter() - started:.1f} s")
        compare(torch_runtime, llama, source, recipe, pairs)


def compare(torch_runtime, llama, source, recipe, pairs):
    found = []
    for _ in range(pairs):
        (slow, slow_tokens), (fast, fast_tokens) = stage(torch_runtime, source, recipe), stage(llama, source, recipe)
        found.append((slow, fast, (fast_tokens / fast) / (slow_tokens / slow)))
        print(f"  transformers {slow:.1f} s ({slow_tokens} tokens), llama.cpp {fast:.1f} s ({fast_tokens})", flush=True)
    dtype = str(torch_runtime.dtype).removeprefix("torch.")
    print(
        f"identify: {statistics.median(one[2] for one in found):.2f}x the tokens per second of transformers ({dtype})"
    )
    print(f"          {statistics.median(one[0] / one[1] for one in found):.2f}x as fast in seconds")


def capture_and_sharing(source, recipe, sequences, pairs):
    bench = load_bench(TRAIT)
    plain = LlamaCppRuntime(source.path, sequences=sequences, listens=False)
    llama = LlamaCppRuntime(source.path, sequences=sequences, source=source)
    questions = bench.search(recipe.identify.questions, recipe.identify.seed)
    prompts = [p for sign in "+-" for p in contrast_prompts(llama, bench, questions, sign, recipe)]
    groups = [0] * len(questions) + [1] * len(questions)
    options = {"max_new_tokens": recipe.identify.max_new_tokens, "repetition_penalty": 1.1}
    ratios = []
    for _ in range(pairs + 1):
        started = time.perf_counter()
        exchanges = plain.generate(prompts, **options)
        middle = time.perf_counter()
        stats, _ = llama.observe(prompts, groups, **options)
        end = time.perf_counter()
        rates = (
            sum(len(one.response) - 1 for one in exchanges) / (middle - started),
            sum(one.tokens for one in stats) / (end - middle),
        )
        ratios.append(rates[1] / rates[0])
        print(f"  plain {rates[0]:.1f}, captured {rates[1]:.1f} tokens/s", flush=True)
    print(f"capture: {statistics.median(ratios[1:]):.3f} of plain generation of the same batch in llama.cpp")
    seconds = [
        (stage_with(llama, source, recipe, shares=False), stage_with(llama, source, recipe)) for _ in range(pairs)
    ]
    fresh = LlamaCppRuntime(source.path, sequences=sequences, source=source)
    stage(fresh, source, recipe)
    saved = fresh.savings
    print(f"sharing: {saved.computed} of {saved.prompt_tokens} prompt tokens computed in one identification;", end=" ")
    print(f"the stage takes {statistics.median(b / a for a, b in seconds):.2f} of the time without")
    for runtime in (plain, llama, fresh):
        runtime.close()


def stage_with(runtime, source, recipe, shares=True):
    """Seconds of the stage with an empty store of shared beginnings, or with none used."""
    from npti_export.runtimes.llamacpp.decoding import Beginnings

    runtime._beginnings = Beginnings()
    observe = runtime.observe
    if not shares:
        runtime.observe = lambda *args, **options: observe(*args, **{**options, "shared": None})
    try:
        return stage(runtime, source, recipe)[0]
    finally:
        runtime.__dict__.pop("observe", None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_model_path())
    parser.add_argument("--half-billion", action="store_true")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--weights", choices=["auto", "file", "bfloat16"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--part", choices=["all", "transformers", "llama.cpp"], default="all")
    arguments = parser.parse_args()
    values = {
        "questions": arguments.questions,
        "max_new_tokens": arguments.tokens,
        "batch_size": arguments.sequences,
        "until": "all",
    }
    recipe = load_recipe("npti", [f"identify.{key}={value}" for key, value in values.items()])
    recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update={"at_least": 100})})
    with tempfile.TemporaryDirectory() as folder:
        path = half_billion(folder) if arguments.half_billion else arguments.model
        source = gguf_source(path)
        print(f"{source.name}: {source.shape}, {path.stat().st_size / 1e6:.0f} MB, {arguments.questions} questions")
        if arguments.part != "llama.cpp":
            options = arguments.weights, arguments.dtype
            against_transformers(source, recipe, arguments.sequences, arguments.pairs, *options)
        if arguments.part != "transformers":
            capture_and_sharing(source, recipe, arguments.sequences, arguments.pairs)


if __name__ == "__main__":
    main()
