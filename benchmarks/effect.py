"""Does the personality show? All ten poles on the default model's held-out test questions.

    python benchmarks/effect.py [--recipes matched npti …] [--questions 36] [--split test] [--poles extraversion+ …]
    python benchmarks/effect.py --table

Scored without a judge, by the unsteered model: mean log-likelihood per token of an answer under personas of the wanted
pole minus under personas of the opposite one. Compared are the plain question to the unsteered model, to the model
prompted with a persona of the pole, and to the model steered by each recipe, with no prompt; all in llama.cpp, on the
bfloat16 copy that identification runs on. Answers are greedy and unselected. Results go to benchmarks/out/effect.jsonl.
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np
from common import OUT, append_line, interval, read_lines, say

from npti_export.bench import load_bench
from npti_export.evaluate.conditions import Test, Way, ask, scored
from npti_export.evaluate.engine import LlamaEngine
from npti_export.identify.collect import cache_folder
from npti_export.identify.profiles import Place, profile_for
from npti_export.loader import Models, RuntimeSettings, Timings
from npti_export.models import resolve_model
from npti_export.progress import Silent
from npti_export.recipe import load_recipe
from npti_export.rule import build_rule
from npti_export.traits import FACETS, TraitSpec

RESULTS = OUT / "effect.jsonl"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["smollm2-135m"], help="NAME, or NAME:section.key=value,…")
    parser.add_argument("--poles", nargs="+", default=[trait + sign for trait in FACETS for sign in "+-"])
    parser.add_argument("--questions", type=int, default=36)
    parser.add_argument("--split", default="test", choices=["test", "search"])
    parser.add_argument("--skip", type=int, default=0, help="first questions of the split that are left out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--personas", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments)
    table(arguments)


def run(arguments):
    source, default = resolve_model(None), load_recipe("smollm2-135m")
    with Models(source, RuntimeSettings(), Timings(), Silent(), verifies=False, sequences=32) as models:
        runtime = models.fast()
        engine = LlamaEngine(source, runtime, runtime.model.path, models.settings.llama, default)
        place = Place(models.fast, source, models.dtype(), models.device(), cache_folder())
        for pole in arguments.poles:
            one_pole(arguments, pole, engine, place, default)


def one_pole(arguments, pole, engine, place, default):
    done = {key(record) for record in read_lines(RESULTS)}
    spec = TraitSpec(pole[:-1], pole[-1])
    bench = load_bench(spec.trait)
    pool = getattr(bench, arguments.split)()
    questions = pool[arguments.skip : arguments.skip + arguments.questions]
    test = Test(bench, spec.sign, questions, default, arguments.tokens, arguments.personas)
    for name in ["base", "persona", *arguments.recipes]:
        setting = f"{name} {arguments.split}{arguments.skip}+{arguments.questions}"
        if (pole, setting) in done or (name == "base" and (other(pole), setting) in done):
            continue
        started = time.time()
        opened = nullcontext(engine.base)
        if name not in ("base", "persona"):
            recipe_name, _, overrides = name.partition(":")
            asked = [f"identify.max_new_tokens={arguments.tokens}", *filter(None, overrides.split(","))]
            recipe = load_recipe(recipe_name, asked)
            opened = engine.steered(build_rule(profile_for(place, bench, [spec.sign], recipe, Silent()), spec, recipe))
        way = Way(name, name, "steered", nullcontext, "persona" if name == "persona" else "plain")
        with opened as runtime:
            told = ask(way, runtime, test)
        (found,) = scored([told], engine.base, test)
        record = {
            "pole": pole,
            "setting": setting,
            "contrast": found.scores.contrast.tolist(),
            "fluency": found.scores.fluency.tolist(),
            "repetition": [one.repetition for one in found.readings],
            "samples": [[q.text, text] for q, text in zip(questions[:2], found.texts[:2], strict=True)],
        }
        append_line(RESULTS, record)
        mean = found.towards(spec.sign).mean()
        say(pole, name, f"{mean:+.4f} {found.scores.fluency.mean():.3f}", f"{time.time() - started:.0f}s")


def key(record):
    return record["pole"], record["setting"]


def other(pole):
    """The opposite pole: its unsteered answers are the same ones, scored the other way round."""
    return pole[:-1] + ("-" if pole[-1] == "+" else "+")


def table(arguments):
    found = {}
    for record in read_lines(RESULTS):
        name, _, place = record["setting"].rpartition(" ")
        if place != f"{arguments.split}{arguments.skip}+{arguments.questions}":
            continue
        for pole in (record["pole"], other(record["pole"])) if name == "base" else (record["pole"],):
            towards = np.array(record["contrast"]) * (1 if pole[-1] == "+" else -1)
            found[pole, name] = {**record, "contrast": towards}
    names = ["persona", *arguments.recipes]
    poles = [pole for pole in arguments.poles if all((pole, name) in found for name in ("base", *names))]
    say(
        "| pole | unsteered | " + " | ".join(f"{name}: gain (95%)" for name in names) + " | fluency: unsteered |",
        end="",
    )
    say("".join(f" {name} |" for name in names))
    say("|---" * (3 + 2 * len(names)) + "|")
    for pole in poles:
        base = found[pole, "base"]
        cells = [pole, f"{base['contrast'].mean():+.3f}"]
        cells += ["{:+.3f} ({:+.3f} to {:+.3f})".format(*interval(gains(found, pole, name))) for name in names]
        cells += [f"{np.mean(found[pole, name]['fluency']):.2f}" for name in ("base", *names)]
        say("| " + " | ".join(cells) + " |")
    for name in ("base", *names):
        mean = np.mean([gains(found, pole, name).mean() for pole in poles])
        fluency = np.mean([np.mean(found[pole, name]["fluency"]) for pole in poles])
        say(f"{name}: mean gain {mean:+.4f}, fluency {fluency:.3f}, poles {len(poles)}")
    for pole in poles:
        for text, answer in found[pole, names[-1]]["samples"]:
            say(f"- {pole}: *{text}*\n  {' '.join(answer.split())}")


def gains(found, pole, name):
    return found[pole, name]["contrast"] - found[pole, "base"]["contrast"]


if __name__ == "__main__":
    main()
