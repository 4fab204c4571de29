"""The default model's recipe: how strong `matched` may be for each pole, by search questions.

    python benchmarks/tune_default.py [--traits extraversion …] [--questions 64] [--threads 2]
    python benchmarks/tune_default.py --table

Every pole is steered by its matched constant at twice its own size, and answers search questions that the constant was
not found on. The loss of fluency grows about with the square of the strength and its noise does not grow, so a large
strength says most about a pole's coefficient. One pole's answers are few all the same (the standard error is as large
as the differences between poles), so coefficients are drawn towards their common mean by as much as their errors demand
(empirical Bayes). A pole's strength is then the largest in steps of 0.05 at which the loss that as many fresh
questions as there are for tests would show is within the budget of 5% with a probability of 95%, and KL on neutral
text under 0.1. Figures go to benchmarks/out/strengths/.
"""

import argparse
import json
import time
from contextlib import nullcontext

import numpy as np
from common import OUT, say

from npti_export.bench import load_bench
from npti_export.evaluate.capability.neutral import NeutralText
from npti_export.evaluate.conditions import Test, Way, ask, scored
from npti_export.identify.collect import cache_folder
from npti_export.loader import RuntimeSettings
from npti_export.progress import Silent
from npti_export.rule import build_rule
from npti_export.traits import FACETS, SIGNS, TraitSpec
from npti_export.tuning.budget import Budget
from npti_export.tuning.opening import ModelJob, opened
from npti_export.tuning.trial import search_questions, trial_passages

RESULTS, STRENGTH = OUT / "strengths", 2.0
ONE_SIDED = 1.645  # standard errors: 95%
FRESH = len(load_bench("extraversion").test())  # questions that the loss is to be shown by


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traits", nargs="+", default=list(FACETS))
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        for trait in arguments.traits:
            if not all(place(trait, sign).is_file() for sign in SIGNS):
                measured(trait, arguments)
    paths = sorted(RESULTS.glob("*.json"))
    if paths:
        table({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths})


def place(trait, sign):
    return RESULTS / f"{trait}{sign}.json"


def measured(trait, arguments):
    """Answers of both poles: losses of fluency, gains and KL, one a question or passage."""
    base = None
    for sign in SIGNS:
        started = time.time()
        job = ModelJob(
            TraitSpec(trait, sign),
            recipe="matched",
            overrides=("identify.max_new_tokens=64", "identify.questions=120", "rule.gamma=1"),
            runtime=RuntimeSettings(threads=arguments.threads),
            cache=cache_folder(),
        )
        with opened(job, Silent()) as at:
            questions = search_questions(at.bench, at.recipe, arguments.questions)
            rule = build_rule(at.profile(at.recipe), TraitSpec(trait, sign, STRENGTH), at.recipe)
            engine, test = at.engine(), Test(at.bench, sign, questions, at.recipe, 64, 1)
            neutral = NeutralText(engine.base, trial_passages())
            if base is None:
                base = scored([ask(Way("unsteered", "", "base", nullcontext), engine.base, test)], engine.base, test)[0]
            with engine.steered(rule) as runtime:
                told = ask(Way("steered", "", "steered", nullcontext), runtime, test)
                damage = neutral.kl(runtime)
            steered = scored([told], engine.base, test)[0]
        record = {
            "unsteered": float(base.scores.fluency.mean()),
            "loss": (base.scores.fluency - steered.scores.fluency).tolist(),
            "gain": (steered.towards(sign) - base.towards(sign)).tolist(),
            "kl": damage.tolist(),
        }
        place(trait, sign).write_text(json.dumps(record), encoding="utf-8")
        say(f"{trait}{sign}: {time.time() - started:.0f} s")


def coefficients(records):
    """Losses of fluency, as shares of the unsteered, by the square of the strength, and the spread between questions.

    The spread is that of all poles together: that of one is itself uncertain, a few odd answers make half of it.
    """
    each = [np.array(one["loss"]) / abs(one["unsteered"]) for one in records]
    spread = np.sqrt(np.mean([one.var(ddof=1) for one in each]))
    return np.array([one.mean() for one in each]) / STRENGTH**2, spread, len(each[0])


def shrunk(estimates, error):
    """Estimates drawn towards their mean, what is left of their error, and how far the poles truly differ."""
    between = max(0.0, estimates.var(ddof=1) - error**2)
    own = between / (between + error**2)
    left = own * error**2 + (1 - own) ** 2 * (between + error**2) / len(estimates)
    return estimates.mean() + own * (estimates - estimates.mean()), np.sqrt(left), np.sqrt(between)


def picked(record, mean, error, spread):
    """The largest strength that keeps the budget."""
    budget = Budget()
    for strength in np.arange(STRENGTH, 0, -0.05).round(2):
        shown = np.hypot(error * strength**2, spread / np.sqrt(FRESH))
        damage = np.mean(record["kl"]) * (strength / STRENGTH) ** 2
        if mean * strength**2 + ONE_SIDED * shown <= budget.max_fluency_loss and damage <= budget.max_kl:
            return strength
    return 0.0


def table(records):
    found, spread, questions = coefficients(records.values())
    own = spread / np.sqrt(questions) / STRENGTH**2
    means, error, between = shrunk(found, own)
    say(f"loss of fluency / strength²: {found.mean():.2%} on average, {own:.2%} standard error of one pole's")
    say(f"poles differ by {between:.2%} truly; after drawing them to the mean the error is {error:.2%}")
    say(f"| pole | at {STRENGTH:g}: gain, loss, KL | loss / strength² | drawn to the mean | picked |")
    say("|---" * 5 + "|")
    for (pole, record), plain, mean in zip(records.items(), found, means, strict=True):
        loss, kl = np.mean(record["loss"]) / abs(record["unsteered"]), np.mean(record["kl"])
        figures = f"{np.mean(record['gain']):+.3f}, {loss:.1%}, {kl:.3f}"
        say(f"| {pole} | {figures} | {plain:.2%} | {mean:.2%} | {picked(record, mean, error, spread):.2f} |")


if __name__ == "__main__":
    main()
