"""What a program costs and keeps, on the default model: two traits, both directions.

    python benchmarks/frontier.py [--programs exact bias …] [--poles extraversion+ …] [--questions 48]
    python benchmarks/frontier.py --speed          # needs a quiet machine
    python benchmarks/frontier.py --table | --figure docs/frontier.svg

For each program: extra width, file size, KL(rule ‖ program) with the MLPs in float32 and KL(rule ‖ file) as llama.cpp
runs it, KL to the unsteered model, the trait effect (benchmarks/effect.py's contrast and fluency, of answers that
llama.cpp gave) on held-out test questions, and prefill and generation against the unsteered file, in turns. Results go
to benchmarks/out/frontier.jsonl and frontier/; the identification is the command line's, from its cache.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from common import OUT, append_line, interval, load_model, read_lines, say

from npti_export.bench import load_bench
from npti_export.compile_for import FileCompiler
from npti_export.compiler.kinds import parse_program
from npti_export.endings.gguf import GGUFEnding
from npti_export.evaluate.contrast import score
from npti_export.gguf.shards import read_model
from npti_export.identify.collect import cache_folder
from npti_export.identify.profiles import Place, identified
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import default_model_path, gguf_source
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.runtimes.base import chat
from npti_export.runtimes.llamacpp.context import Row
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.traits import parse_trait
from npti_export.verify_llamacpp import measure_file

RESULTS, FILES = OUT / "frontier.jsonl", OUT / "frontier"
PROGRAMS = ("exact", "budget:5%", "budget:2.5%", "lowrank:16", "bias")
POLES = ("agreeableness+", "agreeableness-", "extraversion+", "extraversion-")
TOKENS = 64


def path_of(pole, program):
    return FILES / f"{pole}-{program.replace(':', '-').replace('%', '')}.gguf"


def run(arguments):
    FILES.mkdir(parents=True, exist_ok=True)
    done = {(one["pole"], one["program"]) for one in read_lines(RESULTS)}
    _, scorer = load_model()
    for pole in arguments.poles:
        wanted = [name for name in ("unsteered", *arguments.programs) if (pole, name) not in done]
        if wanted:
            run_pole(pole, wanted, scorer, arguments)


def run_pole(pole, programs, scorer, arguments):
    recipe = load_recipe("smollm2-135m-npti", ["verify.prompts=6"])
    spec, path = parse_trait(pole), default_model_path()
    source, bench = gguf_source(path), load_bench(spec.trait)
    rule = build_rule(profile_of(spec.trait, source, recipe), spec, recipe)
    questions = bench.test(arguments.questions)

    def record(program, runtime, **more):
        prompts = [runtime.encode(chat(None, question.text)) for question in questions]
        answers = [one.response for one in runtime.generate(prompts, max_new_tokens=TOKENS, repetition_penalty=1.1)]
        (scores,) = score(scorer, bench, questions, [answers], recipe, personas=2)
        towards = scores.contrast * (1 if spec.sign == "+" else -1)
        append_line(
            RESULTS,
            {"pole": pole, "program": program, "contrast": towards.tolist(), "fluency": scores.fluency.tolist()} | more,
        )
        say(pole, program, f"{towards.mean():+.4f}", {name: value for name, value in more.items() if name != "steps"})

    with LlamaCppRuntime(path, sequences=16, source=source) as base:
        if "unsteered" in programs:
            record("unsteered", base, bytes=path.stat().st_size)
        compiler = FileCompiler(base, recipe, [one.text for one in bench.search(16)], Silent())
        calibration, measure = compiler.calibration(rule), compiler.measure(rule)
        with GGUFEnding(read_model(path), recipe) as ending:
            for name in programs:
                if name == "unsteered":
                    continue
                compiled = compiler.compile(rule, parse_program(name), calibration)
                out = path_of(pole, name)
                written = ending.write_program(compiled.program, {}, out)
                with LlamaCppRuntime(out, sequences=16, source=source) as steered:
                    held_out = [base.encode(chat(None, one.text)) for one in questions[:6]]
                    fidelity, _ = measure_file(
                        base, steered, rule, held_out, recipe, Silent(), program=compiled.program
                    )
                    record(
                        name,
                        steered,
                        bytes=written.nbytes,
                        extra=written.extra_width / source.shape.width,
                        units=compiled.steps[-1].units,
                        kl_program=measure(compiled.program),
                        kl_file=fidelity.kl_rule_artifact,
                        kl_base=fidelity.kl_rule_base,
                        kl_floor=fidelity.kl_runtime_floor,
                    )


def profile_of(trait, source, recipe):
    """The command line's own, from its cache."""
    models = Models(
        source, RuntimeSettings(), Timings(), Silent(), verifies=False, sequences=recipe.identify.batch_size
    )
    with models:
        place = Place(models.fast, source, models.dtype(), models.device(), cache_folder())
        return identified(place, load_bench(trait), recipe, Silent())[1]


def speed(arguments):
    """Prefill of 512 tokens and generation of 8 sequences; each program takes turns with the unsteered file."""
    for program in arguments.programs:
        out = path_of(arguments.poles[0], program)
        if not out.is_file():
            continue
        pairs = []
        for _ in range(arguments.pairs):
            rates = [rates_of(file) for file in (default_model_path(), out)]
            pairs.append([steered / plain for plain, steered in zip(*rates, strict=True)])
        prefill, generation = (statistics.median(column) for column in zip(*pairs, strict=True))
        append_line(RESULTS, {"pole": "speed", "program": program, "prefill": prefill, "generation": generation})
        say(program, f"prefill {prefill:.3f}, generation {generation:.3f}", np.round(pairs, 3).tolist())


def rates_of(path):
    """Tokens per second: prefill, generation."""
    with LlamaCppRuntime(path, listens=False) as runtime:
        context = runtime.context(512, 1)
        prompt = [Row(100 + at, at, 0, at == 511) for at in range(512)]
        best = 0.0
        for _ in range(3):
            context.clear()
            started = time.perf_counter()
            context.decode(prompt)
            best = max(best, 512 / (time.perf_counter() - started))
        context = runtime.context(8 * 64, 8)
        generation = 0.0
        for _ in range(3):
            context.clear()
            started = time.perf_counter()
            for at in range(48):
                context.decode([Row(100 + at, at, sequence, True) for sequence in range(8)])
            generation = max(generation, 8 * 48 / (time.perf_counter() - started))
    return best, generation


def summary():
    """program -> means over poles, with the gain over the unsteered answers."""
    records = read_lines(RESULTS)
    plain = {one["pole"]: np.array(one["contrast"]) for one in records if one["program"] == "unsteered"}
    speeds = {one["program"]: one for one in records if one["pole"] == "speed"}
    found = {}
    for one in records:
        if one["pole"] in plain and one["program"] != "unsteered":
            gain = np.array(one["contrast"]) - plain[one["pole"]]
            found.setdefault(one["program"], []).append(one | {"gain": gain})
    return plain, found, speeds


def table():
    _, found, speeds = summary()
    exact = np.mean([one["gain"].mean() for one in found["exact"]])
    say("| program | extra width | size | KL, program | KL, file | effect (95%) | of exact | fluency | generation |")
    say("|---|---|---|---|---|---|---|---|---|")
    for name in PROGRAMS:
        if name not in found:
            continue
        some = found[name]
        keys = ("extra", "bytes", "kl_program", "kl_file", "kl_base")
        mean = {key: np.mean([one[key] for one in some]) for key in keys}
        gain, low, high = interval(np.concatenate([one["gain"] for one in some]))
        fluency = np.mean([np.mean(one["fluency"]) for one in some])
        rate = f"{speeds[name]['generation']:.2f}" if name in speeds else ""
        say(
            f"| {name} | {mean['extra']:.1%} | {mean['bytes'] / 1e6:.1f} MB | {mean['kl_program']:.2g} "
            f"| {mean['kl_file']:.2g} of {mean['kl_base']:.2g} | {gain:+.3f} ({low:+.3f} to {high:+.3f}) "
            f"| {gain / exact:.0%} | {fluency:.2f} | {rate} |"
        )


def figure(path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "npti"  # the same file each time
    import matplotlib.pyplot as plt

    _, found, _ = summary()
    panes, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in PROGRAMS:
        some = found.get(name, [])
        extra = [100 * one["extra"] for one in some]
        left.plot(extra, [one["kl_file"] for one in some], "o", label=name)
        gain = [one["gain"].mean() for one in some]
        spread = [1.96 * one["gain"].std(ddof=1) / np.sqrt(len(one["gain"])) for one in some]
        right.errorbar(extra, gain, yerr=spread, fmt="o", label=name, capsize=3)
    left.axhline(
        np.mean([one["kl_floor"] for one in found["exact"]]), color="grey", linestyle=":", label="runtime noise"
    )
    left.set(xlabel="extra width, %", ylabel="KL(rule ‖ file), nats", yscale="log")
    right.set(xlabel="extra width, %", ylabel="trait effect, nats per token")
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    panes.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS)
    parser.add_argument("--poles", nargs="+", default=POLES)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.speed:
        speed(arguments)
    elif arguments.figure:
        figure(arguments.figure)
    elif not arguments.table:
        run(arguments)
    if not arguments.figure and not arguments.speed:
        table()


if __name__ == "__main__":
    main()
