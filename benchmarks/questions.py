"""Does more data help? Neurons and effect by the number of search questions, on the default model.

    python benchmarks/questions.py [--traits …] [--effect extraversion agreeableness]
    python benchmarks/questions.py --table | --figure docs/questions.svg

Stability: the first N search questions (any beginning is balanced over facets) are split in two halves at random, each
half selects its neurons, and the overlap of the two selections is their Jaccard index, a mean over splits. Effect: the
rule made from the first N, its answers to test questions, scored as in benchmarks/effect.py. Each question is asked
once a pole; nothing stops early. Results go to benchmarks/out/questions.jsonl.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import OUT, append_line, interval, read_lines, say

from npti_export.bench import load_bench
from npti_export.evaluate.contrast import score
from npti_export.evaluate.engine import LlamaEngine
from npti_export.identify.collect import answer, contrast_prompts, plain_prompts
from npti_export.identify.select import rank
from npti_export.identify.stopping import jaccard
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import resolve_model
from npti_export.profile import profile_from_stats
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.stats import ActivationStats, AnswerCounts
from npti_export.traits import SIGNS, TraitSpec

RESULTS = OUT / "questions.jsonl"
SIZES = (30, 60, 120, 240, 400)
BATCH = 16  # questions, each as both poles
SPLITS = 40
TEST_QUESTIONS = 24
RECIPE = "smollm2-135m-npti"


def ask(runtime, bench, recipe, source):
    """(statistics of both poles after each size, counts of every answer of both poles)."""
    questions = bench.search(SIZES[-1])
    empty = ActivationStats.empty(source.shape.layers, source.shape.width)
    sums, steps, counts = {"+": empty, "-": empty}, {}, {"+": [], "-": []}
    for begin, end in pairwise((0, *SIZES)):
        for start in range(begin, end, BATCH):
            some = questions[start : min(start + BATCH, end)]
            prompts = [p for sign in SIGNS for p in contrast_prompts(runtime, bench, some, sign, recipe, start)]
            groups = [0] * len(some) + [1] * len(some)
            stats, answers = runtime.observe(
                prompts,
                groups,
                max_new_tokens=recipe.identify.max_new_tokens,
                repetition_penalty=recipe.identify.repetition_penalty,
            )
            for at, sign in enumerate(SIGNS):
                sums[sign] += stats[at]
                counts[sign].append(answers[at * len(some) : (at + 1) * len(some)])
        steps[end] = dict(sums)
    joined = {
        sign: AnswerCounts(*(np.concatenate([getattr(one, name) for one in some]) for name in ("active", "tokens")))
        for sign, some in counts.items()
    }
    return steps, joined


def selected(counts, some, sign, select):
    """Neurons that some of the questions select for a pole."""
    rates = [counts[one].active[some].sum(0) / counts[one].tokens[some].sum() for one in SIGNS]
    delta = (rates[0] - rates[1]).ravel() * (1 if sign == "+" else -1)
    mask = np.zeros(len(delta), bool)
    mask[rank(delta, select.threshold, select.at_least, select.at_most)] = True
    return mask


def stability(counts, size, select, rng):
    """Mean overlap of what two halves of the first ``size`` questions select, both poles."""
    found = []
    for _ in range(SPLITS):
        order = rng.permutation(size)
        halves = order[: size // 2], order[size // 2 :]
        found += [jaccard(*(selected(counts, half, sign, select) for half in halves)) for sign in SIGNS]
    return float(np.mean(found))


def run(arguments):
    source = resolve_model(None)
    recipe = load_recipe(RECIPE, ["identify.max_new_tokens=64", "select.at_least=1000", "select.at_most=1000"])
    done = {(one["trait"], one["kind"]) for one in read_lines(RESULTS)}
    with Models(source, RuntimeSettings(), Timings(), Silent(), verifies=False, sequences=2 * BATCH) as models:
        runtime = models.fast()
        engine = LlamaEngine(source, runtime, runtime.model.path, models.settings.llama, recipe)
        for trait in arguments.traits:
            wants = trait in arguments.effect and (trait, "effect") not in done
            if (trait, "stability") not in done or wants:
                one_trait(trait, engine, recipe, wants, (trait, "stability") in done)


def one_trait(trait, engine, recipe, wants, known):
    bench, started = load_bench(trait), time.time()
    steps, counts = ask(engine.base, bench, recipe, engine.source)
    say(trait, "asked", f"{time.time() - started:.0f}s")
    if not known:
        rng = np.random.default_rng(0)
        overlap = {size: stability(counts, size, recipe.select, rng) for size in SIZES}
        append_line(RESULTS, {"trait": trait, "kind": "stability", "overlap": overlap})
        say(trait, overlap)
    if wants:
        append_line(RESULTS, {"trait": trait, "kind": "effect", **effects(engine, bench, steps, recipe)})


def effects(engine, bench, steps, recipe):
    """Contrasts towards ``+`` of each test question: of the plain answers, and by pole and size of the steered ones."""
    questions, scorer = bench.test(TEST_QUESTIONS), engine.base
    prompts = plain_prompts(scorer, questions, recipe)

    def scored(answers):
        (found,) = score(scorer, bench, questions, [answers], recipe, personas=1)
        return {"contrast": found.contrast.tolist(), "fluency": found.fluency.tolist()}

    result = {"plain": scored(answer(scorer, prompts, recipe, 64)), "+": {}, "-": {}}
    for size, stats in steps.items():
        profile = profile_from_stats(bench.trait, stats["+"], stats["-"], engine.source, recipe.rule.percentile, {})
        for sign in SIGNS:
            rule = build_rule(profile, TraitSpec(bench.trait, sign), recipe)
            with engine.steered(rule) as runtime:
                answers = answer(runtime, prompts, recipe, 64)
            result[sign][size] = scored(answers)
            say(bench.trait + sign, size, f"{np.mean(result[sign][size]['contrast']):+.4f}")
    return result


def summary():
    """size -> (mean overlap, gains of all questions of all poles, mean fluency)."""
    overlaps, gains, fluency = ({size: [] for size in SIZES} for _ in range(3))
    for one in read_lines(RESULTS):
        for size in SIZES:
            if one["kind"] == "stability":
                overlaps[size].append(one["overlap"][str(size)])
                continue
            for sign, towards in (("+", 1), ("-", -1)):
                steps = one[sign][str(size)]
                gains[size] += (towards * np.subtract(steps["contrast"], one["plain"]["contrast"])).tolist()
                fluency[size] += steps["fluency"]
    return overlaps, gains, fluency


def table():
    overlaps, gains, fluency = summary()
    say("| search questions | overlap of two halves | (lowest, highest trait) | effect (95%) | fluency |")
    say("|---|---|---|---|---|")
    for size in SIZES:
        mean, low, high = interval(gains[size]) if gains[size] else (np.nan,) * 3
        some = overlaps[size]
        say(
            f"| {size} | {np.mean(some):.2f} | {min(some):.2f}, {max(some):.2f} "
            f"| {mean:+.4f} ({low:+.4f} to {high:+.4f}) | {np.mean(fluency[size] or np.nan):.3f} |"
        )


def figure(path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "npti"  # the same file each time
    import matplotlib.pyplot as plt

    overlaps, gains, _ = summary()
    panes, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    means = [np.mean(overlaps[size]) for size in SIZES]
    left.plot(SIZES, means, "o-")
    left.fill_between(SIZES, [min(overlaps[s]) for s in SIZES], [max(overlaps[s]) for s in SIZES], alpha=0.2)
    left.set(xlabel="search questions", ylabel="overlap of two halves (Jaccard)", xscale="log", ylim=(0, 1))
    found = [interval(gains[size]) for size in SIZES]
    errors = [[mean - low for mean, low, _ in found], [high - mean for mean, _, high in found]]
    right.errorbar(SIZES, [mean for mean, _, _ in found], yerr=errors, fmt="o-", capsize=3)
    right.set(xlabel="search questions", ylabel="trait effect, nats per token", xscale="log")
    right.set_ylim(bottom=0)
    for pane in (left, right):
        pane.set_xticks(SIZES, [str(size) for size in SIZES])
        pane.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    panes.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traits", nargs="*", default=["extraversion", "agreeableness", "conscientiousness"])
    parser.add_argument("--effect", nargs="*", default=["extraversion", "agreeableness"])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.figure:
        figure(arguments.figure)
        return
    if not arguments.table:
        run(arguments)
    table()


if __name__ == "__main__":
    main()
