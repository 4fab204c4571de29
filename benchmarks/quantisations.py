"""How well each type that llama.cpp quantises to carries the rule, on the default model requantised by llama.cpp.

    python benchmarks/quantisations.py [--types Q4_K_M IQ2_XXS ...] [--trait extraversion] [--sign +] [--prompts 2]

The default model's weights are written as F32 and quantised by llama.cpp itself. Its hidden size, 576, is no multiple
of 256: where a type has blocks of 256, llama.cpp takes another for gate and up (the table says which), but keeps it
for down, whose rows are 1,536 long. Types that demand an importance matrix get one of ones. Prints a Markdown table:

- error: of the new down columns, relative, without corrections and with them;
- KL: rule to file, rule to base, and base to base (the floor: llama.cpp against the same weights in torch).
"""

import argparse
import ctypes
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from common import load_model, profile_of, say
from fidelity import dequantised

from npti_export.bench import load_bench
from npti_export.compiler.exact import compile_exact
from npti_export.errors import ModelError
from npti_export.export.gguf import plan_bake, write_bake
from npti_export.gguf.blocks import decode, decode_columns, type_id_of, type_name
from npti_export.gguf.columns import quantise_columns
from npti_export.gguf.reader import read_gguf
from npti_export.identify.collect import plain_prompts
from npti_export.models import gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.runtimes.llamacpp.runtime import opener
from npti_export.runtimes.transformers import TransformersRuntime
from npti_export.traits import TraitSpec
from npti_export.verify import measure

TYPES = [
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K_M", "Q4_1", "Q4_0", "Q4_K_M", "IQ4_NL", "IQ4_XS"),
    *("Q3_K_M", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0"),
    *("MXFP4", "NVFP4", "Q1_0", "Q2_0"),
]

# llama.cpp has no file type for these, or no way out where rows do not fit (Q1_0: 576 is no multiple of 128)
_BY_TENSOR = {"MXFP4": b"ffn_.*", "NVFP4": b"ffn_.*", "Q1_0": b"ffn_down"}
_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def quantised(source, target, kind):
    """``source`` (F32) in a file type of llama.cpp, by its own quantiser; embeddings and attention in Q8_0."""
    import llama_cpp

    header = read_gguf(source)
    params = llama_cpp.llama_model_quantize_default_params()
    by_tensor = _BY_TENSOR.get(kind)
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{'Q8_0' if by_tensor else kind}")
    params.token_embedding_type = params.output_tensor_type = type_id_of("Q8_0")
    overrides = [(b"attn_.*", type_id_of("Q8_0"))]
    if by_tensor:
        overrides.append((by_tensor, type_id_of(kind)))
    tensors = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
    for entry, (pattern, type_id) in zip(tensors, overrides, strict=False):
        entry.pattern, entry.type = pattern, type_id
    params.tt_overrides = tensors
    names = [one.name.encode() for one in header.tensors if len(one.shape) == 2]
    ones = np.ones(max(one.shape[0] for one in header.tensors), np.float32)
    matrix = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    for entry, name in zip(matrix, names, strict=False):
        entry.name, entry.size = name, header.by_name[name.decode()].shape[0]
        entry.data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if kind.startswith(("IQ1", "IQ2", "IQ3")):
        params.imatrix = matrix
    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
        raise SystemExit(f"llama.cpp does not quantise to {kind}")
    return target


def column_error(plan):
    """Relative error of the working columns, without and with corrections, over all layers."""
    wanted2 = alone2 = together2 = 0.0
    with plan.base.path.open("rb") as stream:
        for number, layer in enumerate(plan.program.layers):
            tensor = plan.base.by_name[f"blk.{number}.ffn_down.weight"]
            stream.seek(tensor.offset)
            rows = np.frombuffer(stream.read(tensor.nbytes), np.uint8).reshape(tensor.rows, -1)
            wanted = decode_columns(rows, layer.source, tensor.type_id)
            corrects = np.full(layer.units, -1) if layer.corrects is None else layer.corrects
            works = (layer.up_scale != 0) & (corrects < 0)
            alone = decode(quantise_columns(wanted, None, tensor.type_id), tensor.type_id)
            found = decode(quantise_columns(wanted, layer.corrects, tensor.type_id), tensor.type_id)
            places = np.flatnonzero((corrects >= 0) & (layer.up_scale != 0))
            together = found.copy()
            together[:, corrects[places]] += found[:, places]
            wanted2 += float((wanted[:, works] ** 2).sum())
            alone2 += float(((alone - wanted)[:, works] ** 2).sum())
            together2 += float(((together - wanted)[:, works] ** 2).sum())
    return np.sqrt(alone2 / wanted2), np.sqrt(together2 / wanted2)


def types_of(header):
    """The types of gate and up, and of down, most frequent first."""
    found = []
    for stems in (("ffn_gate", "ffn_up"), ("ffn_down",)):
        count = Counter(type_name(one.type_id) for one in header.tensors if any(stem in one.name for stem in stems))
        found.append(", ".join(name for name, _ in count.most_common()))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--trait", default="extraversion")
    parser.add_argument("--sign", default="+")
    parser.add_argument("--prompts", type=int, default=2)
    arguments = parser.parse_args()
    source, fast = load_model()
    recipe = load_recipe("smollm2-135m-npti")
    profile = profile_of(arguments.trait, source, fast, recipe)
    rule = build_rule(profile, TraitSpec(arguments.trait, arguments.sign), recipe)
    program = compile_exact(rule, recipe.compile.basis_units)
    say("| file | gate, up | down | extra width | error alone | corrected | KL rule, file | KL rule, base | KL floor |")
    say("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        full = dequantised(source.path, Path(folder) / "f32.gguf", "F32")
        for kind in arguments.types:
            base = quantised(full, Path(folder) / "base.gguf", kind)
            plan = plan_bake(read_gguf(base), program, {}, "0" * 64)
            steered = Path(folder) / "steered.gguf"
            write_bake(plan, steered)
            errors = "{:.3f} | {:.3f}".format(*column_error(plan))
            shown = f"| {kind} | {' | '.join(types_of(plan.base))} | {plan.extra} | {errors}"
            try:
                runtime = TransformersRuntime(gguf_source(base), device="cpu", dtype="float32")
            except ModelError:  # gguf-py does not decode Q1_0 and Q2_0
                say(f"{shown} | | | |")
                continue
            prompts = plain_prompts(runtime, load_bench(arguments.trait).test(arguments.prompts), recipe)
            one = measure(runtime, rule, opener(steered), opener(base), prompts, recipe, Silent())
            say(f"{shown} | {one.kl_rule_artifact:.2g} | {one.kl_rule_base:.2g} | {one.kl_runtime_floor:.2g} |")


if __name__ == "__main__":
    main()
