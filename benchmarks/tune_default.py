"""Choose strength and neuron count for the default model, on search questions only.

    python benchmarks/tune_default.py [--questions 24] [--counts 500 2000] [--gammas 0.7 1.4] [--traits extraversion …]

For each pole and setting: how far the steered answers' contrast moves towards the pole, and what that costs in fluency,
beside the unsteered model and the persona prompt. Results go to benchmarks/out/tune.jsonl and are not measured twice.
"""

import argparse
import time
from collections import defaultdict

import numpy as np
from common import OUT, answer_as, append_line, load_model, poles, read_lines, say

from npti_export.bench import load_bench
from npti_export.evaluate.contrast import score
from npti_export.recipe import load_recipe

RESULTS = OUT / "tune.jsonl"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=56)
    parser.add_argument("--personas", type=int, default=2)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.7, 1.0, 1.4])
    parser.add_argument("--traits", nargs="+")
    parser.add_argument("--summary", action="store_true", help="only print what was measured")
    arguments = parser.parse_args()
    if not arguments.summary:
        run(arguments)
    summarise()


def run(arguments):
    source, runtime = load_model()
    done = {(r["trait"], r["setting"]) for r in read_lines(RESULTS)}
    settings = [f"{count}/{gamma}" for count in arguments.counts for gamma in arguments.gammas]
    base_recipe = load_recipe("smollm2-135m")
    for setting in ["base", "persona", *settings]:
        for trait, sign in poles(arguments.traits):
            if (trait + sign, setting) in done:
                continue
            bench = load_bench(trait)
            questions = bench.search(arguments.questions)
            started = time.time()
            condition, recipe = setting, base_recipe
            if setting not in ("base", "persona"):
                count, gamma = setting.split("/")
                condition, recipe = (
                    "steered",
                    load_recipe(
                        "smollm2-135m", [f"select.at_least={count}", f"select.at_most={count}", f"rule.gamma={gamma}"]
                    ),
                )
            answers = answer_as(condition, runtime, source, trait + sign, questions, recipe, arguments.tokens)
            scores = score(runtime, bench, questions, answers, base_recipe, personas=arguments.personas)
            towards = 1 if sign == "+" else -1
            append_line(
                RESULTS,
                {
                    "trait": trait + sign,
                    "setting": setting,
                    "contrast": (towards * scores.contrast).tolist(),
                    "fluency": scores.fluency.tolist(),
                    "sample": runtime.decode(answers[0]),
                },
            )
            mean = towards * scores.contrast.mean()
            say(
                f"{trait + sign:20} {setting:10} {mean:+.3f} fluency {scores.fluency.mean():.2f}",
                f"{time.time() - started:.0f}s",
            )


def summarise():
    """One line a setting: gain of the contrast over the base, by pole, and its mean; mean fluency."""
    rows = defaultdict(dict)
    for record in read_lines(RESULTS):
        rows[record["setting"]][record["trait"]] = record
    base = rows["base"]
    names = sorted(base)
    say("gain over base".ljust(14), *(name[:6] + name[-1] for name in names), "  mean   worst  fluency")
    for setting, by_pole in rows.items():
        if setting == "base" or set(by_pole) != set(names):
            continue
        gains = [np.mean(np.subtract(by_pole[name]["contrast"], base[name]["contrast"])) for name in names]
        fluency = np.mean([np.mean(by_pole[name]["fluency"]) for name in names])
        say(
            setting.ljust(14),
            *(f"{gain:+.3f} " for gain in gains),
            f"{np.mean(gains):+.4f} {min(gains):+.3f} {fluency:.3f}",
        )
    say("base fluency", f"{np.mean([np.mean(one['fluency']) for one in base.values()]):.3f}")


if __name__ == "__main__":
    main()
