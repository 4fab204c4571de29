"""All ten poles on the default model: each made by the main job's default recipe, then evaluated on test questions.

    python benchmarks/poles.py [--poles extraversion+ …] [--questions 32] [--whole extraversion+] [--threads 2]
    python benchmarks/poles.py --table | --samples
    python benchmarks/poles.py --figures docs

An evaluation is that of `npti-export evaluate`, in llama.cpp, beside prompts, other methods at the same damage and
random directions; it goes to benchmarks/out/poles/POLE.json. A second one, of the unsteered and the steered model alone
on all test questions, says within how much of the budget a pole is, and goes to POLE.all.json. A pole that is there is
not evaluated again; one that was made by another recipe or asked otherwise is refused.
`npti-export report benchmarks/out/poles/*.json --html all.html` shows all of them.
"""

import argparse
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import OUT, say

from npti_export.evaluate.document import read_document
from npti_export.evaluate.run import BASELINES, KNOWN_BASELINES, PROMPTED, EvaluationJob, evaluate
from npti_export.evaluate.subject import SubjectJob
from npti_export.identify.collect import cache_folder
from npti_export.job import Job
from npti_export.loader import RuntimeSettings
from npti_export.pipeline import run as run_job
from npti_export.progress import Silent
from npti_export.traits import FACETS, TraitSpec

RESULTS = OUT / "poles"
POLES = [trait + sign for trait in FACETS for sign in "+-"]
COLUMNS = {
    "prompt-adjective": "adjective prompt",
    "prompt-persona": "persona prompt",
    "steered": "steered",
    "steered-prompt-persona": "steered and persona",
    "npti": "NPTI",
    "dpn-le": "DPN-LE",
    "dpn-le-any": "DPN-LE, any effect size",
    "mean-shift": "mean difference",
    "null": "random",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poles", nargs="+", default=POLES)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--whole", nargs="*", default=[], help="poles that also take the inventory and the LoRA row")
    parser.add_argument(
        "--no-adjective", action="store_true", help="leave the adjective prompt out, which saves a sixth"
    )
    parser.add_argument("--samples", action="store_true", help="print the first two answers of each pole")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figures", type=Path)
    arguments = parser.parse_args()
    if not (arguments.table or arguments.samples or arguments.figures):
        if arguments.no_adjective:
            PROMPTED.pop("prompt-adjective")
        for measure in (one_pole, alone):
            for pole in arguments.poles:
                measure(pole, arguments)
    documents = {pole: read_document(place(pole)) for pole in arguments.poles if place(pole).is_file()}
    everything = {pole: read_document(place(pole, ".all")) for pole in documents if place(pole, ".all").is_file()}
    same_settings([*documents.values()])
    if arguments.samples:
        samples(documents)
    else:
        table(documents)
        budget(everything)
    if arguments.figures is not None:
        figures(documents, arguments.figures)


def place(pole, which=""):
    return RESULTS / f"{pole}{which}.json"


def same_settings(documents):
    """One table holds what was measured in one way."""
    ways = {
        (one.version, one.recipe["name"], *(one.settings[name] for name in ("questions", "answer_tokens", "personas")))
        for one in documents
    }
    if len(ways) > 1:
        sys.exit(f"{RESULTS}: evaluations of different kinds lie there, {ways}; remove those that are old")


@contextmanager
def made(pole, arguments):
    """The pole's file, as the main job makes it, ready to be evaluated."""
    runtime = RuntimeSettings(threads=arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        run_job(Job((TraitSpec(pole[:-1], pole[-1]),), path, runtime=runtime, cache=cache_folder()), Silent())
        yield SubjectJob(path, runtime=runtime, cache=cache_folder())


def one_pole(pole, arguments):
    """With everything beside it, on some of the test questions."""
    if place(pole).is_file():
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with made(pole, arguments) as subject:
        middle = time.time()
        whole = pole in arguments.whole
        job = EvaluationJob(
            subject,
            questions=arguments.questions,
            skips=frozenset() if whole else frozenset({"inventory"}),
            baselines=KNOWN_BASELINES if whole else BASELINES,
        )
        document = evaluate(job, Silent())
    place(pole).write_text(document.to_json(), encoding="utf-8")
    gain = document.trait_contrast.gain
    say(
        f"{pole}: {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), KL {document.capability.kl_neutral.mean:.3f},"
    )
    say(f"  made in {middle - started:.0f} s, evaluated in {time.time() - middle:.0f} s: {document.seconds}")


def alone(pole, arguments):
    """The unsteered and the steered model only, on all test questions."""
    if place(pole, ".all").is_file():
        return
    skips = frozenset({"inventory", "capability", "cross-talk"})
    with made(pole, arguments) as subject:
        document = evaluate(EvaluationJob(subject, questions=0, baselines=(), prompted=False, skips=skips), Silent())
    place(pole, ".all").write_text(document.to_json(), encoding="utf-8")
    say(f"{pole}, all test questions: {document.seconds}")


def table(documents):
    """Gains with their intervals by pole, then means over the poles."""
    conditions = {pole: {one.name: one for one in document.conditions} for pole, document in documents.items()}
    names = [name for name in COLUMNS if any(name in one for one in conditions.values())]
    shown = [name for name in ("prompt-persona", "steered", "npti", "null") if name in names]
    say("| pole | " + " | ".join(f"{COLUMNS[name]}: gain (95%)" for name in shown), end=" | ")
    say("fluency: unsteered, prompt, steered | KL, neutral |")
    say("|---" * (3 + len(shown)) + "|")
    for pole, document in documents.items():
        there = conditions[pole]
        cells = [gain_of(there[name]) for name in shown]
        fluency = ", ".join(f"{there[name].fluency.mean:.2f}" for name in ("unsteered", "prompt-persona", "steered"))
        say(f"| {pole} | " + " | ".join(cells) + f" | {fluency} | {document.capability.kl_neutral.mean:.3f} |")
    heads = ("mean over the poles", "gain (95%)", "clear of zero", "steered beyond it (95%)", "fluency", "its damage")
    say(f"\n| {' | '.join(heads)} |")
    say("|---" * 6 + "|")
    say(f"| unsteered | | | | {mean_fluency(conditions, 'unsteered'):.3f} | |")
    for name in names:
        there = {pole: one for pole, one in documents.items() if name in conditions[pole]}
        gains = [conditions[pole][name].gain for pole in there]
        clear = sum(one.low > 0 for one in gains)
        beyond = "" if name == "steered" else pooled(there, "steered", name)
        label = COLUMNS[name] + ("" if len(there) == len(documents) else f" ({', '.join(there)})")
        cells = [label, pooled(there, name, "unsteered"), f"{clear} of {len(gains)}", beyond]
        fluency = mean_fluency({pole: conditions[pole] for pole in there}, name)
        say(f"| {' | '.join(cells)} | {fluency:.3f} | {off_damage(documents, name)} |")
    skills(documents)


def off_damage(documents, name):
    """How far a method is from the artifact's damage, over the poles."""
    levels = {pole: one.settings["baselines"].get(name) for pole, one in documents.items()}
    ratios = {pole: one["damage"] / one["wanted"] for pole, one in levels.items() if one and "wanted" in one}
    return f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f}" if ratios else ""


def budget(documents):
    """Unsteered and steered on all test questions."""
    say("\n| pole | test questions | strength | gain (95%) | loss of fluency (95%) | KL, neutral |")
    say("|---" * 6 + "|")
    for pole, one in documents.items():
        change, base = one.fluency.log_likelihood.change, abs(one.fluency.log_likelihood.base.mean)
        loss = f"{-change.mean / base:.1%} ({-change.high / base:.1%} to {-change.low / base:.1%})"
        strength = (one.recipe["poles"].get(pole, {}).get("rule") or one.recipe["rule"])["gamma"]
        kl = one.capability.kl_neutral.mean
        say(f"| {pole} | {change.n} | {strength:g} | {gain_of(one.conditions[1])} | {loss} | {kl:.3f} |")


def gain_of(condition):
    gain = condition.gain
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def mean_fluency(conditions, name):
    return np.mean([one[name].fluency.mean for one in conditions.values()])


def pooled(documents, name, other):
    """The mean over the poles of what a way gains beyond another, with its 95% interval.

    The pairs are answers to one question. Questions are drawn anew, poles are not; the two poles of a trait answer the
    same ones, so a question's two figures are one.
    """
    gains = [
        np.array([answer.contrast[name] - answer.contrast[other] for answer in document.answers])
        for document in documents.values()
    ]
    by_trait = {}
    for pole, one in zip(documents, gains, strict=True):
        by_trait.setdefault(pole[:-1], []).append(one)
    gains = [np.mean(both, axis=0) for both in by_trait.values()]
    middle = np.mean([one.mean() for one in gains])
    around = 1.96 * np.sqrt(sum(one.var(ddof=1) / len(one) for one in gains)) / len(gains)
    return f"{middle:+.3f} ({middle - around:+.3f} to {middle + around:+.3f})"


def skills(documents):
    names = [task.name for task in next(iter(documents.values())).capability.tasks]
    for at, name in enumerate(names):
        scores = [document.capability.tasks[at].score for document in documents.values()]
        worse = [pole for pole, score in zip(documents, scores, strict=True) if score.change.high < 0]
        before, after = (np.mean([getattr(one, side).mean for one in scores]) for side in ("base", "steered"))
        say(f"{name}: {before:.1%} -> {after:.1%}; clearly worse for {', '.join(worse) or 'no pole'}")
    damage = [document.capability.kl_neutral.mean for document in documents.values()]
    say(f"KL on neutral text: mean {np.mean(damage):.3f}, most {max(damage):.3f}")
    seconds = [document.seconds["total"] for document in documents.values()]
    say(f"seconds an evaluation: {min(seconds):.0f} to {max(seconds):.0f}")


def samples(documents):
    for pole, document in documents.items():
        say(f"\n**{pole}**\n")
        for answer in document.answers[:2]:
            say(f"- *{answer.question}*\n  {' '.join(answer.answers['steered'].split())}")


def figures(documents, folder):
    from npti_export.report_page.figures_effect import cross_talk_matrix
    from npti_export.report_page.svg import write_figure
    from npti_export.report_page.theme import WIDE

    several = list(documents.values())
    drawn = {
        "poles": ("Gain and fluency by pole", lambda look: gains_figure(documents, look)),
        "cross-talk": ("How far each pole moves each trait", lambda look: cross_talk_matrix(several, look)),
    }
    for name, (label, draw) in drawn.items():
        for path in write_figure(draw, folder, name, label, WIDE):
            say(path)


def gains_figure(documents, look):
    """Gains of the persona prompt, the steered model, NPTI and chance, pole by pole, and their fluency."""
    from npti_export.report_page.canvas import drawing, rows, zero_line

    theme = look.theme
    kinds = {"prompt-persona": (theme.prompt, "s"), "steered": (theme.wanted, "o"), "npti": (theme.baseline, "^"),
             "null": (theme.base, "X")}  # fmt: skip
    with drawing(look, 0.42 * len(documents) + 1.1) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for row, document in enumerate(documents.values()):
            there = {one.name: one for one in document.conditions}
            for step, (name, (colour, marker)) in enumerate(kinds.items()):
                if name not in there:
                    continue
                gain, high = there[name].gain, row + 0.16 * (step - 1.5)
                left.plot([gain.low, gain.high], [high, high], color=colour, linewidth=1.4)
                label = COLUMNS[name] if row == 0 else None
                left.plot(gain.mean, high, marker, color=colour, markersize=5, label=label)
                right.plot(there[name].fluency.mean, high, marker, color=colour, markersize=5)
            base = there["unsteered"].fluency.mean
            right.plot([base, base], [row - 0.4, row + 0.4], color=theme.muted, linewidth=1.2)
        rows(left, list(documents), look)
        zero_line(left, look)
        left.set_xlabel("gain of the contrast, nats a token")
        right.set_xlabel("fluency, nats a token; the line is the unsteered model")
        figure.legend(loc="outside upper center", ncols=4)
    return figure


if __name__ == "__main__":
    main()
