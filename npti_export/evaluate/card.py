"""The figures of an evaluation in a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npti_export.endings.base import Format
from npti_export.errors import EvaluationError, shortened
from npti_export.evaluate.document import Condition, Document, Estimate
from npti_export.evaluate.estimate import interval, share
from npti_export.evaluate.poles import judged_otherwise, judged_pole
from npti_export.files import atomic_output
from npti_export.recipe import Recipe
from npti_export.traits import TraitSpec, parse_recorded

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

BEGIN, END = "<!-- npti-export evaluation: begin -->", "<!-- npti-export evaluation: end -->"
_SPECIAL = str.maketrans({one: f"\\{one}" for one in "\\`*_{}[]<>()#+-.!|&~"})
_FENCE = re.compile(r"(`{3,}(?=[^`]*$)|~{3,})")
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_MOST_INDENT = 3  # of a line that is no code block
_SECTIONS = ("prompt", "identify", "select", "rule", "poles", "compile")  # that an artifact depends on
_OF_SPEED = {"batch_size"}  # keys that say how fast, not what


def section(document: Document, *, other_file: bool = False) -> str:
    """What a card says of an evaluation, between two marks by which it is found again.

    Args:
        document: the evaluation.
        other_file: whether it is known to be of other bytes than those that the card goes with.
    """
    contrast, artifact = document.trait_contrast, document.artifact
    steered = " ".join(document.traits)
    of = ", ".join(_plain(str(artifact[name])) for name in ("path", "format") if name in artifact)
    pole = judged_pole(document) or steered
    other = f", which is steered towards {_plain(steered)}" if judged_otherwise(document) else ""
    parts = [
        "## Does the personality show, and what does it cost?",
        f"Measured by npti-export {_plain(document.version)} for {_plain(pole)}, of {of}{other}, on {contrast.gain.n} "
        "held-out test questions, which chose nothing. The contrast is the mean log-likelihood per token of an answer "
        "under personas of the wanted pole minus that under personas of the opposite one, computed by the unsteered "
        f"model, over {contrast.personas} pairs of personas; the gain is how far it is above the unsteered answers'. "
        "Fluency is the log-likelihood per token under the plain question, by the unsteered model, too. Intervals are "
        "95% bootstraps over questions; those of random neurons or directions are over draws.",
        _conditions(document),
        "\n".join(f"- {line}" for line in _lines(document)),
    ]
    if other_file:
        parts.insert(
            2,
            "These figures were measured on another file of the same rule, made by the same settings, whose bytes are "
            "not those of the file here.",
        )
    return "\n\n".join([BEGIN, *parts, END])


def _conditions(document: Document) -> str:
    rows = ["| | gain (95%) | fluency | |", "|---|---|---|---|"]
    found = document.settings.get("baselines")
    levels: dict[str, Any] = found if isinstance(found, dict) else {}
    for one in document.conditions:
        gain = "" if one.gain is None else interval(one.gain)
        rows.append(f"| {_plain(one.label)} | {gain} | {one.fluency.mean:.2f} | {_remark(one, levels)} |")
    return "\n".join(rows)


def _remark(one: Condition, levels: dict[str, Any]) -> str:
    remarks = []
    if one.gain is not None and one.gain.low <= 0 <= one.gain.high:
        remarks.append("not clear of zero")
    level = levels.get(one.name)
    damage = level.get("damage") if isinstance(level, dict) else one.damage
    if isinstance(damage, int | float):
        remarks.append(f"KL {damage:.3f} on neutral text")
    return ", ".join(remarks)


def _lines(document: Document) -> Iterable[str]:
    contrast, capability = document.trait_contrast, document.capability
    if contrast.share_of_prompt is not None:
        yield f"The gain is {share(contrast)} of the better prompt's."
    if contrast.beyond_null is not None:
        beyond = interval(contrast.beyond_null)
        yield f"Gain beyond random neurons or directions, drawn anew for every few questions: {beyond}."
    kl = capability.kl_neutral
    yield (
        f"On neutral text it is {kl.mean:.3f} nats per token from the unsteered model (KL, {kl.low:.3f} to "
        f"{kl.high:.3f}, {kl.n} passages)."
    )
    for task in capability.tasks:
        score = task.score
        yield (
            f"Skill, {_plain(task.name)} ({_plain(task.metric)}): {score.base.mean:.0%} before, "
            f"{score.steered.mean:.0%} after; change {interval(score.change, 2)}."
        )
    if document.cross_talk is not None:
        moved = ", ".join(f"{_plain(name)} {interval(one)}" for name, one in document.cross_talk.items())
        yield f"Moves towards the + pole of each trait: {moved}."
    if document.inventory is not None:
        traits = document.inventory.traits.items()
        rated = ", ".join(f"{_plain(name)} {interval(one.change, 2)}" for name, one in traits)
        yield f"Self-report items ({_plain(document.inventory.source)}), change on a scale of 1 to 5: {rated}."
    for judge in document.judge.judges if document.judge else ():
        before, after = judge.trait.get("unsteered"), judge.trait.get("steered")
        if before is not None and after is not None:
            figures = f"{_rated(before)} before, {_rated(after)} after"
            yield f"Judge {_plain(judge.judge)}, 1 to 5 for the trait: {figures}."


def update_card(path: Path, document: Document) -> None:
    """Put the section into a card, in the place of an earlier one; every other byte stays. Without a card, make one.

    Raises:
        EvaluationError: see :func:`check_card`.
        OutputError: it cannot be written.
    """
    text = check_card(path)
    before, rest, marks = text, "", _marks(text)
    if marks:
        (_, begins), (_, ends) = marks
        before, rest = text[:begins], text[ends + len(END) :]
    elif before:
        newline = "\r\n" if "\r\n" in before else "\n"
        before += newline if before.endswith("\n") else 2 * newline
    with atomic_output(path, force=True) as temporary:
        # bytes: line endings of other parts are not ours to change
        temporary.write_bytes((before + section(document) + (rest or "\n")).encode())


def check_card(path: Path) -> str:
    """The text of a card that can be updated; nothing where there is none.

    Raises:
        EvaluationError: it cannot be read, or the marks in it are damaged.
    """
    if not path.exists():
        return ""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"--card {path}: cannot be read as text ({error}); name another file") from error
    if [mark for mark, _ in _marks(text)] not in ([], [BEGIN, END]):
        raise EvaluationError(f"--card {path}: the marks around the evaluation in it are damaged; delete both")
    return text


def _marks(text: str) -> list[tuple[str, int]]:
    """The marks that stand alone on a line, and where; none that is quoted in a sentence or in a fenced code block.

    A block that is never closed is taken for none, or a slip in front of the section would hide it.
    """
    found: list[tuple[str, int]] = []
    hidden: list[tuple[str, int]] = []  # in the block at hand
    fence, place = "", 0
    for line in _LINES.findall(text):
        words = line.strip(" \t\r\n")
        if fence:
            if _indent(line) <= _MOST_INDENT and words.strip(fence[0]) == "" and len(words) >= len(fence):
                fence, hidden = "", []
        elif _indent(line) <= _MOST_INDENT and (opening := _FENCE.match(words)):
            fence = opening[1]
        if words in (BEGIN, END) and _indent(line) <= _MOST_INDENT:
            (hidden if fence else found).append((words, place + line.index(words)))
        place += len(line)
    return found + hidden


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def check_same_rule(
    path: Path,
    document: Document,
    traits: Sequence[TraitSpec],
    fingerprint: str,
    recipe: Recipe,
    kind: Format,
    *,
    benches: Mapping[str, str],
    strengths: bool = True,
    compiles: bool = True,
) -> None:
    """Raise unless an evaluation is of the rule that a job makes.

    Args:
        path: of the evaluation.
        document: the same, read.
        traits: the job's poles.
        fingerprint: of its model.
        recipe: resolved.
        kind: format of what it writes.
        benches: digest of the personas and questions of each trait.
        strengths: compare those of the poles, too.
        compiles: compare how the rule is compiled, too.

    Raises:
        EvaluationError: another format, model, bench or recipe, other poles or strengths, or no rule at all; the field
            is named.
    """
    if not document.layers:
        raise EvaluationError(f"--evaluation {path}: is of a file that holds no rule; evaluate what is uploaded")
    evaluated = [parse_recorded(text) for text in document.traits]
    theirs, ours = (sorted(str(one) if strengths else one.pole for one in specs) for specs in (evaluated, traits))
    bench = benches.get(str(document.settings.get("pole"))[:-1])
    pairs: list[tuple[str, Any, Any]] = [
        ("artifact.format", document.artifact.get("format"), kind),
        ("model.fingerprint", document.model.get("fingerprint"), fingerprint),
        ("traits", theirs, ours),
        ("recipe", document.recipe is None, False),
    ]
    if bench is not None and "bench" in document.settings:
        pairs.append(("settings.bench", document.settings["bench"], bench))
    wanted = json.loads(recipe.to_json())
    for name in _SECTIONS if compiles else _SECTIONS[:-1]:
        there, here = _section(document.recipe, name), wanted[name]
        keys = [key for key in dict.fromkeys([*there, *here]) if key not in _OF_SPEED]
        pairs += [(f"recipe.{name}.{key}", there.get(key), here.get(key)) for key in keys]
    for field, there, here in pairs:
        if there != here:
            shown = "" if field == "recipe" else f" ({shortened(there)} there, {shortened(here)} here)"
            raise EvaluationError(
                f"--evaluation {path}: '{field}' is not that of this job{shown}; evaluate what is uploaded, or leave "
                "it out"
            )


def _section(recipe: dict[str, Any] | None, name: str) -> dict[str, Any]:
    found = (recipe or {}).get(name)
    return found if isinstance(found, dict) else {}


def is_other_file(document: Document, sha256: str | dict[str, str]) -> bool:
    """Whether an evaluation is known to be of other bytes than an artifact: not where either does not say.

    Args:
        document: the evaluation.
        sha256: of the artifact; of several files by name.
    """
    known = document.artifact.get("sha256")
    if isinstance(known, dict) and isinstance(sha256, dict):
        return any(known[name] != sha256[name] for name in known.keys() & sha256.keys())
    return isinstance(known, str) and isinstance(sha256, str) and known != sha256


def results(document: Document) -> list[EvalResult]:
    """The gain and the distance on neutral text, as the Hub's front matter lists results."""
    from huggingface_hub import EvalResult

    contrast, kl = document.trait_contrast, document.capability.kl_neutral
    figures = (
        ("questions", "likelihood-contrast-gain", "gain of the likelihood contrast, nats per token", contrast.gain),
        ("neutral text", "kl-neutral", "KL to the unsteered model on neutral text, nats per token", kl),
    )
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"npti-export-{asked.replace(' ', '-')}",  # by which the Hub tells data sets apart
            dataset_name=f"npti-export's {asked}",
            metric_type=kind,
            metric_name=name,
            metric_value=round(one.mean, 4),
        )
        for asked, kind, name, one in figures
    ]


def _rated(value: Estimate) -> str:
    return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


def _plain(text: str) -> str:
    """Foreign text, on one line, in which no markup counts."""
    return " ".join(text.split()).translate(_SPECIAL).encode(errors="replace").decode()
