"""How early identification can stop: the overlap that is predicted after each batch, and the one that comes true.

    python benchmarks/anytime.py [--traits extraversion openness] [--questions 0]

Every question is asked once; after each batch the neurons selected so far are compared with those selected from all.
Half against half is what two independent identifications with half of the questions each agree on.
"""

import argparse
import functools
import operator

import numpy as np
from common import say

from npti_export.bench import load_bench
from npti_export.identify.collect import run_batch
from npti_export.identify.select import rank
from npti_export.identify.stopping import expected_overlap, jaccard
from npti_export.models import resolve_model
from npti_export.recipe import select_recipe
from npti_export.runtimes.llamacpp.runtime import LlamaCppRuntime
from npti_export.stats import ContrastStats
from npti_export.traits import FACETS


def chosen(stats, select, sign):
    delta = (stats.plus.probability() - stats.minus.probability()).ravel()
    mask = np.zeros(len(delta), bool)
    mask[rank(delta if sign == "+" else -delta, select.threshold, select.at_least, select.at_most)] = True
    return mask


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traits", nargs="*", default=list(FACETS))
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    source = resolve_model(None)
    recipe = select_recipe(None, source.fingerprint, tuple(arguments.overrides), neurons=True)
    runtime = LlamaCppRuntime(source.path, sequences=recipe.identify.batch_size, source=source)
    size = recipe.identify.batch_size // 2
    say("trait, questions, tokens, predicted overlap, overlap with all: + and -")
    for trait in arguments.traits:
        bench = load_bench(trait)
        questions = bench.search(arguments.questions, recipe.identify.seed)
        starts = range(0, len(questions), size)
        parts = [run_batch(runtime, bench, questions[start : start + size], start, recipe) for start in starts]
        total = ContrastStats.empty(source.shape.layers, source.shape.width)
        sums = [total := total + part for part in parts]
        final = {sign: chosen(sums[-1], recipe.select, sign) for sign in "+-"}
        for start, stats in zip(starts, sums, strict=True):
            predicted = expected_overlap(stats, recipe.select, len(questions))
            real = [jaccard(chosen(stats, recipe.select, sign), final[sign]) for sign in "+-"]
            tokens = (stats.plus.tokens + stats.minus.tokens) / (sums[-1].plus.tokens + sums[-1].minus.tokens)
            asked = min(start + size, len(questions))
            say(f"{trait:18} {asked:4} {tokens:5.0%}  {predicted:.3f}   {real[0]:.3f} {real[1]:.3f}")
        halves = [functools.reduce(operator.add, some) for some in (parts[::2], parts[1::2])]
        agree = [jaccard(*(chosen(half, recipe.select, sign) for half in halves)) for sign in "+-"]
        say(f"{trait:18} half against half     {agree[0]:.3f} {agree[1]:.3f}")


if __name__ == "__main__":
    main()
