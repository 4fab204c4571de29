"""Fidelity and speed of a dial on the default model, as shipped and as F32: each pole at several strengths, two mixed.

    python benchmarks/dial.py --profile extraversion.safetensors --profile openness.safetensors [--units 5]

Fidelity is measured in llama.cpp on held-out questions and the steered answers to them (KL in nats per token). Prints
two Markdown tables; speed is the median of rounds in which base, widened base and dial take turns.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from fidelity import dequantised
from generation import tokens_per_second

from npti_export.bench import load_bench
from npti_export.compiler.dial import compile_dial
from npti_export.dial.index import Adapter, Dial
from npti_export.dial.run import OpenDial
from npti_export.export.dial import plan_dial, write_dial
from npti_export.files import sha256_file
from npti_export.gguf.reader import read_gguf
from npti_export.models import default_model_path, gguf_source
from npti_export.profile_io import load_profile
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule, compose
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.context import Settings
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import TraitSpec
from npti_export.verify_llamacpp import measure_file

STRENGTHS = (0.25, 0.5, 1.0, 1.5)


def made(base, poles, recipe, profiles, units, folder):
    rules = {spec.pole: build_rule(profiles[spec.trait], spec, recipe) for spec in poles}
    program = compile_dial(rules, units, 2)
    adapters = tuple(map(Adapter.of, program.adapters))
    plan = plan_dial(read_gguf(base), program, [folder / one.file for one in adapters], {}, [sha256_file(base)])
    write_dial(plan, folder / "base.gguf")
    return Dial("base.gguf", adapters, 2), plan


def rule_of(mix, profiles, recipe):
    """Made anew at its strength, so that it shares no scaling with the dial."""
    return compose([build_rule(profiles[spec.trait], spec, recipe) for spec in mix])


def fidelity(opened, mixes, profiles, recipe, prompts):
    for mix in mixes:
        for without in ((), ("overlap",)) if len(mix) > 1 else ((),):
            scales = opened.dial.scales(mix)
            pairs = zip(opened.dial.adapters, scales, strict=True)
            opened.steered.apply({opened.folder / one.file: scale for one, scale in pairs if one.kind not in without})
            rule = rule_of(mix, profiles, recipe)
            one, _ = measure_file(opened.base, opened.steered, rule, prompts, recipe, Silent())
            name = " ".join(map(str, mix)) + " without its overlap" * bool(without)
            print(
                f"| {name} | {one.kl_rule_base:.3f} | {one.kl_rule_artifact:.2g} | {one.kl_runtime_floor:.2g} |",
                flush=True,
            )


def speed(opened, runs):
    rounds = []
    for _ in range(runs + 1):
        plain = tokens_per_second(opened.base)
        opened.turn(())
        zero = tokens_per_second(opened.steered)
        opened.turn([TraitSpec("extraversion", "+")])
        rounds.append((plain, zero, tokens_per_second(opened.steered)))
    plain, zero, one = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
    print(f"tokens/s: base {plain:.0f}, all at zero {zero:.0f}, one pole {one:.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, action="append", required=True)
    parser.add_argument("--units", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--bases", nargs="+", default=["F32", "shipped"])
    arguments = parser.parse_args()
    shipped, settings = default_model_path(), Settings(threads=arguments.threads)
    recipe = load_recipe("smollm2-135m-npti", [f"verify.answer_tokens={arguments.tokens}"])
    loaded = [load_profile(path, gguf_source(shipped).shape) for path in arguments.profile]
    profiles = {one.trait: one for one in loaded}
    poles = [TraitSpec(trait, sign) for trait in profiles for sign in "+-"]
    first, other = poles[0], poles[-2]
    mixes = [(TraitSpec(spec.trait, spec.sign, strength),) for spec in poles[:2] for strength in STRENGTHS]
    mixes += [(first, other), (TraitSpec(first.trait, first.sign, 0.5), TraitSpec(other.trait, other.sign, 1.5))]
    for name in arguments.bases:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            base = shipped if name == "shipped" else dequantised(shipped, folder / "model.gguf", name)
            dial, plan = made(base, poles, recipe, profiles, arguments.units, folder)
            source = gguf_source(base)
            adapters = sum(one.nbytes for one in plan.files) / 1e6
            print(
                f"{name}: {base.stat().st_size / 1e6:.0f} MB, dial {plan.bake.nbytes / 1e6:.0f} MB wider by "
                f"{plan.bake.extra}, {len(dial.adapters)} adapters {adapters:.1f} MB",
                flush=True,
            )
            with (
                LlamaCppRuntime(base, settings, source=source) as plain,
                LlamaCppRuntime(folder / "base.gguf", settings, sequences=arguments.prompts, source=source) as steered,
            ):
                opened = OpenDial(plain, steered, dial, folder)
                questions = load_bench(first.trait).test(arguments.prompts)
                prompts = [plain.encode(chat(None, question.text)) for question in questions]
                opened.turn(())
                same = all(np.array_equal(plain.logits(one), steered.logits(one)) for one in prompts)
                print(f"all at zero: {'bitwise the same' if same else 'not bitwise the same'}\n")
                print("| mix | effect | KL to the rule | runtime floor |\n|---|---|---|---|")
                fidelity(opened, mixes, profiles, recipe, prompts)
                speed(opened, arguments.runs)


if __name__ == "__main__":
    main()
