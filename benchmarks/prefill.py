"""Why statistics come from a teacher-forced pass: tokens a second of decoding, of a plain pass, and of a counting one.

python benchmarks/prefill.py [--questions 16]
"""

import argparse
import time

from common import load_model, say

from npti_export.bench import load_bench
from npti_export.identify.collect import contrast_prompts
from npti_export.recipe import load_recipe


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    arguments = parser.parse_args()
    _, runtime = load_model()
    recipe, bench = load_recipe("smollm2-135m"), load_bench("extraversion")
    questions = bench.search(arguments.questions)
    prompts = [prompt for sign in "+-" for prompt in contrast_prompts(runtime, bench, questions, sign, recipe)]
    for turn in ("warm-up", "measured"):
        started = time.perf_counter()
        exchanges = runtime.generate(prompts, max_new_tokens=64, repetition_penalty=1.1)
        decoding = sum(len(one.response) for one in exchanges) / (time.perf_counter() - started)
        tokens = sum(len(one.tokens) for one in exchanges)
        ids, mask = runtime._pad([one.tokens for one in exchanges], left=False)
        started = time.perf_counter()
        with torch.inference_mode():
            runtime.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        plain = tokens / (time.perf_counter() - started)
        started = time.perf_counter()
        runtime.activation_stats(exchanges)
        counting = tokens / (time.perf_counter() - started)
        say(f"{turn}: decoding {decoding:.0f}, plain pass {plain:.0f}, counting pass {counting:.0f} tokens/s; ", end="")
        say(f"counting / decoding {counting / decoding:.1f}, counting / plain {counting / plain:.2f}")


if __name__ == "__main__":
    main()
