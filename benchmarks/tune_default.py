"""The default model's recipe: how strong `matched` may be for each pole, by search questions.

    python benchmarks/tune_default.py [--traits extraversion …] [--questions 64] [--threads 2]
    python benchmarks/tune_default.py --table

Every pole is steered by its matched constant at twice its own size, and answers search questions that the constant was
not found on. The loss of fluency grows about with the square of the strength and its noise does not grow, so a large
strength says most about a pole's coefficient. One pole's answers are few all the same (the standard error is as large
as the differences between poles), so coefficients are drawn towards their common mean by as much as their errors demand
(empirical Bayes, DerSimonian and Laird's variance between poles). A pole's strength is then the largest at which its
loss is within the budget of 5% with a probability of 95%, and that is under KL 0.1 on neutral text, rounded down to
0.05. Figures go to benchmarks/out/strengths/.
"""

import argparse
import json
import time
from contextlib import nullcontext

import numpy as np
from common import OUT, say

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


def coefficient(record):
    """Loss of fluency, as a share of the unsteered, by the square of the strength: estimate and standard error."""
    each = np.array(record["loss"]) / abs(record["unsteered"]) / STRENGTH**2
    return each.mean(), each.std(ddof=1) / np.sqrt(len(each))


def shrunk(estimates, errors):
    """Estimates drawn towards their common mean, and what is left of their errors."""
    weights = 1 / errors**2
    mean = weights @ estimates / weights.sum()
    excess = weights @ (estimates - mean) ** 2 - (len(estimates) - 1)
    between = max(0.0, excess / (weights.sum() - weights @ weights / weights.sum()))
    weights = 1 / (errors**2 + between)
    mean, own = weights @ estimates / weights.sum(), between / (between + errors**2)
    left = own * errors**2 + (1 - own) ** 2 / weights.sum()
    return mean + own * (estimates - mean), np.sqrt(left), np.sqrt(between)


def table(records):
    found = np.array([coefficient(one) for one in records.values()])
    means, errors, between = shrunk(found[:, 0], found[:, 1])
    budget = Budget()
    say(f"loss of fluency / strength²: {np.mean(found[:, 0]):.2%} on average; poles differ by {between:.2%} truly")
    say(f"| pole | at {STRENGTH:g}: gain, loss, KL | loss / strength² | drawn to the mean | picked |")
    say("|---" * 5 + "|")
    for (pole, record), own, mean, error in zip(records.items(), found, means, errors, strict=True):
        loss, kl = np.mean(record["loss"]) / abs(record["unsteered"]), np.mean(record["kl"])
        most = min(budget.max_fluency_loss / max(mean + ONE_SIDED * error, 1e-9), budget.max_kl * STRENGTH**2 / kl)
        picked = np.floor(min(most**0.5, STRENGTH) * 20 + 1e-9) / 20
        figures = f"{np.mean(record['gain']):+.3f}, {loss:.1%}, {kl:.3f}"
        say(f"| {pole} | {figures} | {own[0]:.2%} ± {own[1]:.2%} | {mean:.2%} ± {error:.2%} | {picked:.2f} |")


if __name__ == "__main__":
    main()
