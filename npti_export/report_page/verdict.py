"""The verdict in plain words: does it show, is it fluent, is it clever, is the file faithful."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from npti_export.evaluate.document import Document, Task
from npti_export.report_page.wording import (
    MISSING,
    best_prompt,
    estimate,
    interval,
    judged,
    judged_aside,
    number,
    percent,
    share,
    short,
)

Level = Literal["good", "fair", "bad", "unknown"]

FLUENCY_BUDGET = 0.05  # of the unsteered log-likelihood per token: the loss that counts as none
KL_BUDGET = 0.1  # nats per token on neutral text: the damage that counts as small
PERPLEXITY_LIMIT = 2.0  # times the unsteered perplexity: from here on, answers are broken
REPETITION_LIMIT = 0.1  # more repeated 3-grams than the unsteered model, as a share: heard as a stutter
SKILL_LIMIT = 0.1  # of a score between 0 and 1: from here on, a fall is a loss of skill and not a dent
# Fewest values that a verdict is passed on. A bootstrap of values that all have one sign never reaches zero, and by
# chance alone n of them do with probability 2 / 2^n: under the 5% that the interval promises from six on.
FEWEST = 6
_TOO_FEW = "Too few questions"


@dataclass(frozen=True)
class Gauge:
    """A bar, all places between 0 and 1.

    Attributes:
        start: where the bar begins.
        length: of the bar.
        spread: ends of the interval.
        marks: places that the bar is compared with, and what they are.
    """

    start: float
    length: float
    spread: tuple[float, float] | None
    marks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Finding:
    """One question and its answer."""

    question: str
    level: Level
    answer: str
    figure: str
    unit: str
    detail: str
    gauge: Gauge | None = None


def findings(document: Document) -> list[Finding]:
    """The four questions, in order."""
    return [_shows(document), _fluent(document), _clever(document), _faithful(document)]


def summary(document: Document) -> str:
    """The verdict in one sentence."""
    shows, fluent, clever, faithful = (one.level for one in findings(document))
    if shows == "bad":
        return f"The file does not show {judged(document)}."
    what = judged(document) if judged_aside(document) else "the personality"
    if document.trait_contrast.gain.n < FEWEST:
        parts = [f"Whether {what} shows cannot be told from so few questions"]
    else:
        parts = [f"{what[0].upper()}{what[1:]} shows" if shows == "good" else f"Whether {what} shows is not settled"]
    words = {"good": "stays", "fair": "is a little less", "bad": "is no longer"}
    if fluent in words:
        parts.append(f"the model {words[fluent]} fluent")
    if clever in words:
        who = "" if fluent in words else "the model "
        skills = {"good": f"{who}keeps its skills", "fair": "its skills are dented", "bad": f"{who}loses skill"}
        parts.append(skills[clever])
    elif document.capability.tasks:
        parts.append("whether it keeps its skills is not settled")
    if faithful in ("good", "bad"):
        parts.append("the file does what the rule says" if faithful == "good" else "the file is not faithful")
    return (", ".join(parts[:-1]) + ", and " + parts[-1] if len(parts) > 1 else parts[0]) + "."


def _shows(document: Document) -> Finding:
    part = document.trait_contrast
    gain = part.gain
    few = gain.n < FEWEST
    level: Level = "unknown" if few else "good" if gain.low > 0 else "bad"
    words = f"{interval(gain, sign=True)} (95%, {_questions(gain.n)})"
    if few:
        answer, detail = _TOO_FEW, f"{_questions(gain.n)}: no interval over fewer than {FEWEST} means much."
    elif gain.low > 0:
        answer, detail = "Yes", f"The interval, {words}, is clear of zero."
    elif gain.high < 0:
        answer, detail = "No, the other way", f"It moves away from the wanted pole: {words}."
    else:
        answer, detail = "Not shown", f"The interval, {words}, includes zero."
    if part.share_of_prompt is not None:
        detail += f" That is {share(part)} of what the better persona prompt does."
    elif best_prompt(document) is None:
        detail += " No persona prompt was measured beside it."
    if part.null is not None and not few:
        beyond = part.gain if part.beyond_null is None else part.beyond_null
        clear = part.null.low > 0 or part.null.high < 0
        detail += f" As many neurons or directions at random: {estimate(part.null, sign=True)}"
        detail += ", which is not zero either: read the gain with care." if clear else ", no effect."
        if beyond.low <= 0 < gain.low:
            detail += f" The gain beyond that, {interval(beyond, sign=True)}, is not clear of zero."
        level = "fair" if level == "good" and (clear or beyond.low <= 0) else level
    detail = " ".join(filter(None, (judged_aside(document), detail)))
    prompt = best_prompt(document)
    marks = {"the persona prompt's": prompt.gain.mean} if prompt and prompt.gain else {}
    question = f"Does {judged(document)} show?" if judged_aside(document) else "Does the personality show?"
    return Finding(question, level, answer, number(gain.mean, sign=True),
                   "nats per token towards it", detail, _gauge(gain.mean, (gain.low, gain.high), marks))  # fmt: skip


def _fluent(document: Document) -> Finding:
    part, prompt = document.fluency, best_prompt(document)
    base, steered = part.log_likelihood.base.mean, part.log_likelihood.steered.mean
    loss = (base - steered) / abs(base) if base else 0.0
    ratio = part.perplexity.steered.mean / part.perplexity.base.mean if part.perplexity.base.mean else 1.0
    repeats = part.repetition.change.mean > REPETITION_LIMIT
    detail = (
        f"Perplexity under the unsteered model goes from {number(part.perplexity.base.mean, 2)} to "
        f"{number(part.perplexity.steered.mean, 2)}"
    )
    if prompt is not None:
        detail += f"; the persona prompt's answers have {number(prompt.perplexity.mean, 2)}"
    detail += (
        f". Repeated word triples: {percent(part.repetition.base.mean, 1)} before, "
        f"{percent(part.repetition.steered.mean, 1)} after."
    )
    level: Level
    if part.log_likelihood.change.n < FEWEST:
        level, answer = "unknown", _TOO_FEW
    elif loss <= FLUENCY_BUDGET and not repeats:
        level, answer = "good", "Yes"
    elif prompt is not None and steered >= prompt.fluency.mean and not repeats:
        level, answer = "good", "Yes, no less than with the prompt"
    elif ratio >= PERPLEXITY_LIMIT:
        level, answer = "bad", "No"
    else:
        level, answer = "fair", "Mostly, but it repeats itself" if repeats else "A little less"
    change = part.log_likelihood.change
    marks = (
        {"the persona prompt's loss": base - prompt.fluency.mean} if prompt else {"budget": FLUENCY_BUDGET * abs(base)}
    )
    arrow = f"{number(part.perplexity.base.mean, 2)} → {number(part.perplexity.steered.mean, 2)}"
    return Finding("Is it still fluent?", level, answer, arrow, "perplexity of its answers", detail,
                   _gauge(-change.mean, (-change.high, -change.low), marks))  # fmt: skip


def _clever(document: Document) -> Finding:
    part = document.capability
    kl = part.kl_neutral
    moved = f"On neutral text it is KL {estimate(kl)} away from the unsteered model, in nats per token."
    if not part.tasks:
        return Finding("Is it still clever?", "unknown", "Not tested", number(kl.mean), "KL on neutral text",
                       f"No test of skill was run. {moved}")  # fmt: skip
    mean = sum(task.score.change.mean for task in part.tasks) / len(part.tasks)
    level, answer, detail = _skills(part.tasks)
    detail += f" {moved}"
    if kl.mean > KL_BUDGET and level == "good":
        level, answer = "fair", "Yes, but it moved"
    if kl.mean > KL_BUDGET and level in ("fair", "unknown"):
        detail += f" That is over {KL_BUDGET:g}, which would count as little."
    return Finding("Is it still clever?", level, answer, number(100 * mean, 1, sign=True), "points, mean of the tests",
                   detail, _gauge(kl.mean, (kl.low, kl.high), {"KL that counts as little": KL_BUDGET}))  # fmt: skip


def _skills(tasks: Sequence[Task]) -> tuple[Level, str, str]:
    """Level, answer and detail by the tests of skill alone: kept is what cannot have fallen by much."""
    enough = [task for task in tasks if task.score.change.n >= FEWEST]
    fell = sorted((task for task in enough if task.score.change.high < 0), key=lambda task: task.score.change.mean)
    if fell:
        detail = f"Clearly down: {', '.join(map(_fall, fell))}."
        if any(task.score.change.mean <= -SKILL_LIMIT for task in fell):
            return "bad", "It lost skill", detail
        return "fair", "Slightly less", detail
    if not enough:
        return "unknown", _TOO_FEW, f"No test has {FEWEST} questions: {', '.join(map(_fall, tasks))}."
    unsure = [task for task in tasks if task not in enough or task.score.change.low <= -SKILL_LIMIT]
    detail = f"No score is clearly down: {', '.join(map(_fall, tasks))}."
    if not unsure:
        return "good", "Yes", detail
    words = ", ".join(
        f"{short(task.name, 60)} ({percent(task.score.change.low, sign=True)} to "
        f"{percent(task.score.change.high, sign=True)}, {_questions(task.score.change.n)})"
        for task in unsure
    )
    detail += f" But a loss of {percent(SKILL_LIMIT)} or more is not ruled out: {words}."
    return "unknown", "Not settled", detail


def _questions(count: int) -> str:
    return "1 question" if count == 1 else f"{count} questions"


def _fall(task: Task) -> str:
    return f"{short(task.name, 60)} {percent(task.score.base.mean)} → {percent(task.score.steered.mean)}"


def _faithful(document: Document) -> Finding:
    found = document.fidelity
    error, limit = found.get("kl_rule_artifact"), found.get("limit")
    question = "Does the file do what the rule says?"
    if error is None:
        detail = "The evaluation holds no comparison of the file with its rule; npti-export verify makes one."
        return Finding(question, "unknown", "Not measured", MISSING, "KL to the rule", detail)
    detail = f"Rule and file differ by KL {number(error, 4)} nats per token"
    if "kl_runtime_floor" in found:
        detail += f"; the runtime's own noise is {number(found['kl_runtime_floor'], 4)}"
    if "kl_rule_base" in found:
        detail += f", and the rule moves the model by {number(found['kl_rule_base'], 3)}"
    detail += "."
    if "top1" in found:
        detail += f" They agree on the likeliest token {percent(found['top1'], 1)} of the time."
    level: Level = "unknown" if limit is None else "good" if error <= limit else "bad"
    answer = {"unknown": "No limit given", "good": "Yes", "bad": "No"}[level]
    unit = "KL to the rule" if limit is None else f"KL to the rule, limit {number(limit, 4)}"
    marks = {} if limit is None else {"limit": limit}
    return Finding(question, level, answer, number(error, 4), unit, detail, _gauge(error, None, marks))


def _gauge(value: float, spread: tuple[float, float] | None, marks: dict[str, float]) -> Gauge | None:
    """A bar from zero to a value, on a scale that holds all there is; none where there is nothing to compare with."""
    ends = [0.0, value, *(spread or ()), *marks.values()]
    if not marks or not all(map(math.isfinite, ends)):
        return None
    low, reach = min(ends), (max(ends) - min(ends)) * 1.04
    if not reach or not math.isfinite(reach):
        return None

    def place(at: float) -> float:
        return float((at - low) / reach)

    begin, end = sorted((place(0.0), place(value)))
    zero = ((place(0.0), "0"),) if low < 0 else ()
    named = tuple((place(at), name) for name, at in marks.items())
    return Gauge(begin, end - begin, spread and (place(spread[0]), place(spread[1])), (*zero, *named))
