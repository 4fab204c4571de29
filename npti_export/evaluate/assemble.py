"""From what was measured to the document."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from npti_export.evaluate.conditions import LARGEST_LOG, Answered, Test, condition, perplexity
from npti_export.evaluate.document import (
    Answer,
    CapabilityPart,
    Change,
    Condition,
    ContrastPart,
    Distribution,
    Document,
    Estimate,
    FluencyPart,
    Interval,
    InventoryPart,
    JudgePart,
    LayerShape,
)
from npti_export.evaluate.estimate import estimate, resampled, transformed
from npti_export.evaluate.subject import Subject
from npti_export.files import sha256_file
from npti_export.gguf.shards import named_shards
from npti_export.loader import Timings
from npti_export.rule import SteeringRule
from npti_export.version import __version__

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        answered: unsteered and steered first.
        capability: of the artifact.
        inventory: likewise; None where it was left out, as below.
        judged: all conditions.
        cross_talk: gain towards the + pole of each trait, ``[questions]``.
        strengths: of the baselines, with the damage that they do.
        distribution: activations of the trait's neurons; None where no baseline needed them.
    """

    answered: list[Answered]
    capability: CapabilityPart
    inventory: InventoryPart | None
    judged: JudgePart | None
    cross_talk: dict[str, Doubles]
    strengths: dict[str, dict[str, float]]
    distribution: Distribution | None = None


def assemble(found: Found, subject: Subject, test: Test, settings: dict[str, object], timings: Timings) -> Document:
    """The document of an evaluation."""
    base, steered = found.answered[:2]
    named = {one.way.name: one for one in found.answered}
    conditions = [condition(one, named[one.way.against], test) for one in found.answered]
    seed = test.seed
    return Document(
        version=__version__,
        artifact={
            "path": subject.artifact.name,
            "format": subject.format,
            "bytes": _size(subject),
            "sha256": _digest(subject.artifact),
        },
        model=_model(subject),
        traits=_traits(subject),
        poles=_poles(subject),
        recipe=json.loads(subject.recipe.to_json()),
        fidelity=_fidelity(subject),
        settings=settings | ({"baselines": found.strengths} if found.strengths else {}),
        seconds={key: round(value, 2) for key, value in timings.seconds.items()},
        trait_contrast=_contrast(conditions, found.answered, test),
        judge=found.judged,
        inventory=found.inventory,
        fluency=_fluency(base, steered, seed),
        capability=found.capability,
        cross_talk={name: estimate(values, seed=seed) for name, values in found.cross_talk.items()} or None,
        baselines={one.name: one for one in conditions[2:]},
        conditions=conditions,
        answers=_answers(found.answered, test),
        layers=[] if subject.saved is None else _layers(subject.saved.rule),
        distribution=found.distribution,
    )


def _model(subject: Subject) -> dict[str, object]:
    """The unsteered model: as the artifact knows it, or another one that the user put in its place."""
    source, about = subject.source, None if subject.saved is None else subject.saved.about
    if about is None or about.fingerprint.float32 != source.fingerprint:
        name, known = source.name, (source.hub_id, source.license)
    else:
        name, known = about.model, (about.base, about.license)
    return {"name": name, "fingerprint": source.fingerprint, "id": known[0], "license": known[1]}


def _fidelity(subject: Subject) -> dict[str, float]:
    """What was measured when the artifact was made; a file that nobody verified holds no numbers there."""
    measured = {} if subject.saved is None else subject.saved.about.fidelity
    found = {name: value for name, value in measured.items() if math.isfinite(value)}
    return found | ({"limit": subject.limit} if subject.limit is not None and found else {})


def _traits(subject: Subject) -> list[str]:
    return [subject.spec.pole] if subject.saved is None else subject.saved.about.trait.split()


def _contrast(conditions: list[Condition], answered: list[Answered], test: Test) -> ContrastPart:
    base, steered = answered[:2]
    gains = steered.towards(test.sign) - base.towards(test.sign)
    share, within = _share(gains, conditions, answered, test)
    null = next((one for one in answered if one.way.kind == "null"), None)
    beyond = None
    if null is not None:
        plain = next(one for one in answered if one.way.name == null.way.against)
        chance = null.towards(test.sign) - plain.towards(test.sign)
        beyond = estimate(gains - chance, seed=test.seed, groups=null.groups)
    facets = dict.fromkeys(question.facet for question in test.questions if question.facet is not None)
    own = {facet: np.array([question.facet == facet for question in test.questions]) for facet in facets}
    return ContrastPart(
        personas=test.personas,
        base=conditions[0].contrast,
        steered=conditions[1].contrast,
        gain=estimate(gains, seed=test.seed),
        null=next((one.gain for one in conditions if one.kind == "null"), None),
        beyond_null=beyond,
        share_of_prompt=share,
        share_interval=within,
        by_facet={facet: estimate(gains[mask], seed=test.seed) for facet, mask in own.items()},
    )


def _share(
    gains: Doubles, conditions: list[Condition], answered: list[Answered], test: Test
) -> tuple[float | None, Interval | None]:
    """Of the better prompt's gain. A ratio to what may be nothing at all has no interval."""
    prompts = [
        (one.gain, told)
        for one, told in zip(conditions, answered, strict=True)
        if one.kind == "prompt" and one.name.startswith("prompt-") and one.gain is not None
    ]
    gain, best = max(prompts, key=lambda one: one[0].mean, default=(None, None))
    if gain is None or best is None or gain.mean <= 0:
        return None, None
    prompted = best.towards(test.sign) - answered[0].towards(test.sign)
    within = None
    if gain.low > 0:
        within = resampled(
            lambda some: float(gains[some].mean() / prompted[some].mean()), range(len(gains)), seed=test.seed
        )
    return float(gains.mean() / gain.mean), within


def _fluency(base: Answered, steered: Answered, seed: int) -> FluencyPart:
    def change(name: str) -> Change:
        before, after = (np.array([getattr(one, name) for one in side.readings], float) for side in (base, steered))
        return _change(before, after, seed)

    likelihood = _change(base.scores.fluency, steered.scores.fluency, seed)
    return FluencyPart(
        log_likelihood=likelihood,
        perplexity=Change(
            base=perplexity(likelihood.base),
            steered=perplexity(likelihood.steered),
            change=_shifted(likelihood),
        ),
        repetition=change("repetition"),
        distinct=change("distinct"),
        length=change("length"),
    )


def _shifted(likelihood: Change) -> Estimate:
    """Change of the perplexity: that of the base times what the log-likelihood's change makes of it."""
    base = likelihood.base.mean

    def change(moved: float) -> float:
        before, after = (math.exp(min(-value, LARGEST_LOG)) for value in (base, base + moved))
        return after - before

    return transformed(likelihood.change, change)


def _change(base: Doubles, steered: Doubles, seed: int) -> Change:
    return Change(
        base=estimate(base, seed=seed),
        steered=estimate(steered, seed=seed),
        change=estimate(steered - base, seed=seed),
    )


def _answers(answered: list[Answered], test: Test) -> list[Answer]:
    towards = {one.way.name: one.towards(test.sign) for one in answered}
    return [
        Answer(
            question=question.text,
            facet=question.facet,
            topic=question.topic,
            answers={one.way.name: one.texts[place] for one in answered},
            contrast={name: round(float(values[place]), 4) for name, values in towards.items()},
        )
        for place, question in enumerate(test.questions)
    ]


def _layers(rule: SteeringRule) -> list[LayerShape]:
    constants = rule.constant if rule.constant is not None else np.zeros_like(rule.shift)
    return [
        LayerShape(shift=int(np.count_nonzero(shift)), clamp=int(clamp.sum()), constant=float(np.linalg.norm(constant)))
        for shift, clamp, constant in zip(rule.shift, rule.clamp, constants, strict=True)
    ]


def _poles(subject: Subject) -> list[dict[str, str]]:
    from npti_export.traits import parse_recorded

    found = []
    for spec in [subject.spec] if subject.saved is None else map(parse_recorded, _traits(subject)):
        pole = subject.benches[spec.trait].definition.pole(spec.sign)
        found.append({"pole": spec.pole, "name": pole.name, "description": pole.description})
    return found


def _digest(path: Path) -> str | dict[str, str]:
    """Of a file; of each part of a split one, or file with weights of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else named_shards(path)
    digests = {file.name: sha256_file(file) for file in files}
    return digests if path.is_dir() or len(files) > 1 else digests[path.name]


def _size(subject: Subject) -> int:
    path = subject.artifact
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else named_shards(path)
    return sum(one.stat().st_size for one in files)
