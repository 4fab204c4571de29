"""Does the personality show? All ten poles on the default model's held-out test questions.

    python benchmarks/effect.py [--recipe smollm2-135m] [--traits extraversion …] [--table]

Scored without a judge, by the unsteered model: mean log-likelihood per token of an answer under personas of the wanted
pole minus under personas of the opposite one. Compared are the plain question to the unsteered model, to the model
prompted with a persona of the pole, and to the steered model with no prompt. Answers are greedy and unselected.
Results go to benchmarks/out/effect.jsonl; --table prints Markdown from what is there.
"""

import argparse
import time

import numpy as np
from common import OUT, answer_as, append_line, interval, load_model, poles, read_lines, say

from npti_export.bench import load_bench
from npti_export.evaluate.contrast import score
from npti_export.recipe import load_recipe

RESULTS = OUT / "effect.jsonl"
CONDITIONS = ("base", "persona", "steered")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--traits", nargs="+")
    parser.add_argument("--questions", type=int, default=0, help="test questions a trait, 0 for all")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--personas", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments)
    table(arguments.recipe)
    samples(arguments.recipe)


def run(arguments):
    source, runtime = load_model()
    recipe = load_recipe(arguments.recipe)
    done = {(r["recipe"], r["pole"], r["condition"]) for r in read_lines(RESULTS)}
    for trait, sign in poles(arguments.traits):
        bench = load_bench(trait)
        questions = bench.test(arguments.questions)
        for condition in CONDITIONS:
            if condition == "base" and sign == "-":
                continue  # the same answers as for +, scored the other way round
            if (arguments.recipe, trait + sign, condition) in done:
                continue
            started = time.time()
            answers = answer_as(condition, runtime, source, trait + sign, questions, recipe, arguments.tokens)
            scores = score(runtime, bench, questions, answers, recipe, personas=arguments.personas)
            record = {
                "recipe": arguments.recipe,
                "pole": trait + sign,
                "condition": condition,
                "contrast": scores.contrast.tolist(),
                "fluency": scores.fluency.tolist(),
                "samples": [[q.text, runtime.decode(a)] for q, a in zip(questions[:2], answers[:2], strict=True)],
            }
            append_line(RESULTS, record)
            say(trait + sign, condition, f"{scores.contrast.mean():+.4f}", f"{time.time() - started:.0f}s")


def results(recipe):
    """(pole, condition) -> record, contrasts towards the pole."""
    found = {}
    for record in read_lines(RESULTS):
        if record["recipe"] != recipe:
            continue
        trait, sign = record["pole"][:-1], record["pole"][-1]
        signs = "+-" if record["condition"] == "base" else sign
        for one in signs:
            towards = np.array(record["contrast"]) * (1 if one == "+" else -1)
            found[trait + one, record["condition"]] = {**record, "contrast": towards}
    return found


def table(recipe):
    found = results(recipe)
    names = sorted({pole for pole, _ in found if all((pole, one) in found for one in CONDITIONS)})
    say("| pole | unsteered | prompt | steered | steered - unsteered (95%) | fluency: unsteered | prompt | steered |")
    say("|---|---|---|---|---|---|---|---|")
    gains = {"persona": [], "steered": []}
    for pole in names:
        mean = {one: found[pole, one]["contrast"].mean() for one in CONDITIONS}
        fluency = {one: np.mean(found[pole, one]["fluency"]) for one in CONDITIONS}
        gain, low, high = interval(found[pole, "steered"]["contrast"] - found[pole, "base"]["contrast"])
        for one, values in gains.items():
            values.append(mean[one] - mean["base"])
        say(
            f"| {pole} | {mean['base']:+.3f} | {mean['persona']:+.3f} | {mean['steered']:+.3f} "
            f"| **{gain:+.3f}** ({low:+.3f} to {high:+.3f}) "
            f"| {fluency['base']:.2f} | {fluency['persona']:.2f} | {fluency['steered']:.2f} |"
        )
    say(f"mean gain: persona prompt {np.mean(gains['persona']):+.4f}, steered {np.mean(gains['steered']):+.4f}")


def samples(recipe):
    found = results(recipe)
    for (pole, condition), record in sorted(found.items()):
        if condition == "steered":
            say(f"\n**{pole}**\n")
            for question, text in record["samples"]:
                say(f"- *{question}*\n  {' '.join(text.split())}")


if __name__ == "__main__":
    main()
