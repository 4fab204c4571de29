"""Fidelity of the baked file on the default model, as shipped and as F32 and F16.

    python benchmarks/fidelity.py [--trait extraversion] [--units 3 4 5] [--gammas 0.7 1.4]

Bases: the shipped file, and its dequantised weights written as F32 and F16 by gguf-py. Prints a Markdown table.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import load_model, profile_of, say

from npti_export.bench import load_bench
from npti_export.compiler.exact import compile_exact
from npti_export.export.gguf import plan_bake, write_bake
from npti_export.gguf.reader import read_gguf
from npti_export.identify.collect import plain_prompts
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.runtimes.llamacpp.runtime import opener
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.traits import TraitSpec
from npti_export.verify import measure


def dequantised(source, target, kind):
    """A copy of a GGUF with every matrix as F32 or F16; F16 rounds the weights."""
    from gguf import GGUFReader, GGUFWriter
    from gguf.constants import GGUFValueType
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kinds = field.types
        sub = kinds[1] if kinds[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kinds[0], sub_type=sub)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        keep = kind == "F32" or values.ndim == 1
        writer.add_tensor(tensor.name, values.astype(np.float32 if keep else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trait", default="extraversion")
    parser.add_argument("--units", type=int, nargs="+", default=[4])
    parser.add_argument("--gammas", type=float, nargs="+")
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    source, fast = load_model()
    recipe = load_recipe("smollm2-135m-npti")
    profile = profile_of(arguments.trait, source, fast, recipe)
    runtime = TransformersRuntime(source, dtype="float32")
    prompts = plain_prompts(runtime, load_bench(arguments.trait).test(arguments.prompts), recipe)
    say("| base | pole | gamma | clamp units | effect | KL to the rule | runtime floor | top-1 | extra width |")
    say("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bases = {"Q4_1 (shipped)": source.path}
        for kind in ("F32", "F16"):
            bases[kind] = dequantised(source.path, Path(folder) / f"{kind}.gguf", kind)
        for name, path in bases.items():
            for gamma in arguments.gammas or [recipe.rule.gamma]:
                for units in arguments.units:
                    for sign in "+-":
                        chosen = load_recipe("smollm2-135m-npti", [f"rule.gamma={gamma}"])
                        rule = build_rule(profile, TraitSpec(arguments.trait, sign), chosen)
                        plan = plan_bake(read_gguf(path), compile_exact(rule, units), {}, "0" * 64)
                        write_bake(plan, Path(folder) / "steered.gguf")
                        steered, base = opener(Path(folder) / "steered.gguf"), opener(path)
                        one = measure(runtime, rule, steered, base, prompts, chosen, Silent())
                        say(
                            f"| {name} | {arguments.trait}{sign} | {gamma:g} | {units} "
                            f"| {one.kl_rule_base:.3f} "
                            f"| {one.kl_rule_artifact:.2g} | {one.kl_runtime_floor:.2g} | {one.top1:.1%} "
                            f"| {plan.extra} |"
                        )


if __name__ == "__main__":
    main()
