"""Does a trait of one's own show? Its held-out test questions on the default model, unsteered, prompted and steered.

    npti-export identify --trait ./examples/traits/pirate --out pirate.safetensors
    python benchmarks/own_trait.py ./examples/traits/pirate+ pirate.safetensors [--recipe smollm2-135m] [--tokens 64]

Scored as in effect.py: log-likelihood per token of an answer under personas of the pole minus under those of the
opposite one, by the unsteered model. Answers are greedy and unselected; two are printed for each condition.
"""

import argparse
from pathlib import Path

import numpy as np
from common import interval, load_model, say

from npti_export.bench import load_bench
from npti_export.evaluate.contrast import score
from npti_export.identify.collect import answer, contrast_prompts, plain_prompts
from npti_export.profile_io import load_profile
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.steer import steered
from npti_export.traits import parse_trait


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pole")
    parser.add_argument("profile", type=Path)
    parser.add_argument("--recipe", default="smollm2-135m-npti")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    spec = parse_trait(arguments.pole)
    recipe = load_recipe(arguments.recipe)
    source, runtime = load_model()
    bench = load_bench(spec.trait, spec.folder)
    questions = bench.test()
    plain = plain_prompts(runtime, questions, recipe)
    prompted = contrast_prompts(runtime, bench, questions, spec.sign, recipe)
    rule = build_rule(load_profile(arguments.profile, source.shape), spec, recipe)
    answers = {name: answer(runtime, prompts, recipe, arguments.tokens) for name, prompts in
               (("unsteered", plain), ("prompt", prompted))}  # fmt: skip
    with steered(runtime.activations, rule, runtime.down_projections):
        answers["steered"] = answer(runtime, plain, recipe, arguments.tokens)
    found = score(runtime, bench, questions, list(answers.values()), recipe, personas=2)
    scores = dict(zip(answers, found, strict=True))
    towards = {name: (1 if spec.sign == "+" else -1) * one.contrast for name, one in scores.items()}
    for name, one in scores.items():
        gain, low, high = interval(towards[name] - towards["unsteered"]) if name != "unsteered" else (0.0, 0.0, 0.0)
        say(f"{name}: {towards[name].mean():+.3f}, gain {gain:+.3f} ({low:+.3f} to {high:+.3f}), ", end="")
        say(f"fluency {np.mean(one.fluency):.2f}")
        for question, text in zip(questions[:2], answers[name], strict=False):
            say(f"  {question.text}\n    {' '.join(runtime.decode(text).split())}")


if __name__ == "__main__":
    main()
