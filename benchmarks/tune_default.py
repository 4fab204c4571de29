"""The default model's recipe: how strong `matched` is to be, by the tuner's own trials on search questions.

    python benchmarks/tune_default.py [--poles extraversion+ …] [--questions 32]
    python benchmarks/tune_default.py --table

For each pole `npti-export tune --methods matched` makes its first trials: the matched constant at four strengths in all
layers. One strength is picked for all poles: the one that gains most on average while the fluency of all answers
together falls by no more than 5% and KL on neutral text stays under 0.1 for every pole. (A pick for one pole by itself
rests on 32 answers; such a one, the best of 70 trials of all methods for extraversion-, gained +0.055 on the search
questions that it was picked by and +0.031 on test questions.) Results go to benchmarks/out/tuned/.
"""

import argparse
import time
from collections import defaultdict

import numpy as np
from common import OUT, say
from rich.console import Console

from npti_export.errors import EvaluationError
from npti_export.evaluate.supplements import read_tuning
from npti_export.identify.collect import cache_folder
from npti_export.progress import Silent
from npti_export.traits import FACETS, TraitSpec
from npti_export.tuning.budget import Budget
from npti_export.tuning.delivery import deliver_tuning
from npti_export.tuning.opening import ModelJob
from npti_export.tuning.tune import TuneJob

RESULTS, STRENGTHS = OUT / "tuned", 4
POLES = [trait + sign for trait in FACETS for sign in "+-"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poles", nargs="+", default=POLES)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--personas", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for pole in [] if arguments.table else arguments.poles:
        one_pole(pole, arguments)
    table([pole for pole in arguments.poles if place(pole).is_file()])


def place(pole):
    return RESULTS / f"{pole}.json"


def one_pole(pole, arguments):
    if place(pole).is_file():
        return
    started = time.time()
    job = TuneJob(
        ModelJob(
            TraitSpec(pole[:-1], pole[-1]),
            recipe="matched",
            overrides=("identify.max_new_tokens=64", "identify.questions=120"),
            cache=cache_folder(),
        ),
        trials=STRENGTHS,
        questions=arguments.questions,
        confirm=False,  # benchmarks/poles.py does
        personas=arguments.personas,
        methods=("matched",),
        storage=RESULTS / "trials.sqlite",
    )
    try:
        deliver_tuning(job, Console(width=140), Silent(), json_path=place(pole))
    except EvaluationError as error:  # no strength keeps the budget here: the figures are there all the same
        say(error)
    say(pole, f"{time.time() - started:.0f}s")


def table(poles):
    """Gain, loss of fluency and KL by strength: pole by pole, and all together."""
    found, base = defaultdict(dict), {}
    for pole in poles:
        record = read_tuning(place(pole))
        base[pole] = record.base_fluency
        for trial in record.trials:
            if trial.rule["first_layer"] == 0 and trial.rule["last_layer"] == 1:
                found[round(trial.rule["gamma"] * trial.rule["matched"], 3)][pole] = trial
    strengths = sorted(found)
    say("| pole | unsteered | " + " | ".join(f"{one:g}: gain, fluency, KL" for one in strengths) + " |")
    say("|---" * (2 + len(strengths)) + "|")
    for pole in poles:
        trials = [found[strength][pole] for strength in strengths]
        cells = [f"{one.gain.mean:+.3f}, {one.fluency.mean:.2f}, {one.damage.mean:.3f}" for one in trials]
        say(f"| {pole} | {base[pole]:.2f} | " + " | ".join(cells) + " |")
    picked, best, budget = None, 0.0, Budget()
    for strength in strengths:
        trials = [found[strength][pole] for pole in poles]
        gain, fluency = (np.mean([getattr(one, name).mean for one in trials]) for name in ("gain", "fluency"))
        unsteered, damage = np.mean([base[pole] for pole in poles]), max(one.damage.mean for one in trials)
        keeps = budget.holds(damage, fluency, unsteered)
        say(f"{strength:g}: gain {gain:+.4f}, fluency {fluency:.3f} of {unsteered:.3f}, KL at most {damage:.3f}", keeps)
        if keeps and gain > best:
            picked, best = strength, gain
    say("picked:", picked)


if __name__ == "__main__":
    main()
