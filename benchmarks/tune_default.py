"""The default model's recipe: how strong `matched` may be for each pole, by search questions.

    python benchmarks/tune_default.py [--traits extraversion …] [--questions 64] [--threads 2]
    python benchmarks/tune_default.py --table

Every pole is steered by its matched constant at two strengths, and answers search questions that the constant was not
found on. The loss of fluency grows about with the square of the strength, so each strength gives an estimate of a
pole's coefficient; the noise of a loss does not grow, so the larger strength says more. One pole's answers are few
(the standard error is as large as the differences between poles), so coefficients are drawn towards their common mean
by as much as their errors demand (empirical Bayes, DerSimonian and Laird's variance between poles). A pole's strength
is then the largest at which its loss is within the budget of 5% with a probability of 95%, and that is under KL 0.1 on
neutral text, rounded down to 0.05. Figures go to benchmarks/out/strengths/.
"""

import argparse
import json
import time

import numpy as np
from common import OUT, say

from npti_export.evaluate.conditions import Test
from npti_export.identify.collect import cache_folder
from npti_export.loader import RuntimeSettings
from npti_export.progress import Silent
from npti_export.rule import build_rule
from npti_export.traits import FACETS, SIGNS, TraitSpec
from npti_export.tuning.budget import Budget
from npti_export.tuning.opening import ModelJob, opened
from npti_export.tuning.trial import Measure, search_questions, trial_passages

RESULTS, STRENGTHS = OUT / "strengths", (1.25, 2.0)
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
            for sign in SIGNS:
                measured(trait, sign, arguments)
    paths = sorted(RESULTS.glob("*.json"))
    if paths:
        table({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths})


def measured(trait, sign, arguments):
    """Answers of one pole at each strength: losses of fluency and gains, question by question."""
    spec, path = TraitSpec(trait, sign), RESULTS / f"{trait}{sign}.json"
    if path.is_file():
        return
    started = time.time()
    job = ModelJob(
        spec,
        recipe="matched",
        overrides=("identify.max_new_tokens=64", "identify.questions=120"),
        runtime=RuntimeSettings(threads=arguments.threads),
        cache=cache_folder(),
    )
    with opened(job, Silent()) as at:
        questions = search_questions(at.bench, at.recipe, arguments.questions)
        profile = at.profile(at.recipe)
        measure = Measure(at.engine(), Test(at.bench, sign, questions, at.recipe, 64, 2), trial_passages())
        base, found = measure.base, []
        for strength in STRENGTHS:
            rule = build_rule(profile, TraitSpec(trait, sign, strength), at.recipe)
            steered, damage = measure.steered(rule)
            loss = base.scores.fluency - steered.scores.fluency
            gain = steered.towards(sign) - base.towards(sign)
            found.append({"strength": strength, "loss": loss.tolist(), "gain": gain.tolist(), "kl": damage.tolist()})
    record = {"unsteered": float(base.scores.fluency.mean()), "strengths": found}
    path.write_text(json.dumps(record), encoding="utf-8")
    say(f"{trait}{sign}: {time.time() - started:.0f} s")


def coefficient(record):
    """Loss of fluency, as a share of the unsteered, by the square of the strength: estimate and standard error.

    Both strengths answer the same questions; a question's two losses are weighed into one figure, by the square of the
    strength, and the error is the spread of these figures over the questions.
    """
    squares = np.array([one["strength"] ** 2 for one in record["strengths"]])
    losses = np.array([one["loss"] for one in record["strengths"]]) / abs(record["unsteered"])
    each = squares @ losses / (squares @ squares)
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
    say(f"loss of fluency / strength²: {np.mean(found[:, 0]):.2%} over the poles, which differ by {between:.2%} truly")
    say(
        "| pole | "
        + " | ".join(f"{one:g}: gain, loss, KL" for one in STRENGTHS)
        + " | loss / strength² | drawn | picked |"
    )
    say("|---" * (len(STRENGTHS) + 4) + "|")
    for (pole, record), own, mean, error in zip(records.items(), found, means, errors, strict=True):
        cells = []
        for one in record["strengths"]:
            loss = np.mean(one["loss"]) / abs(record["unsteered"])
            cells.append(f"{np.mean(one['gain']):+.3f}, {loss:.1%}, {np.mean(one['kl']):.3f}")
        damage = max(np.mean(one["kl"]) / one["strength"] ** 2 for one in record["strengths"])
        most = min(budget.max_fluency_loss / max(mean + ONE_SIDED * error, 1e-9), budget.max_kl / damage) ** 0.5
        picked = np.floor(min(most, STRENGTHS[-1]) * 20 + 1e-9) / 20
        drawn = f"{own[0]:.2%} ± {own[1]:.2%} | {mean:.2%} ± {error:.2%}"
        say(f"| {pole} | {' | '.join(cells)} | {drawn} | {picked:.2f} |")


if __name__ == "__main__":
    main()
