"""What an evaluation found out: the JSON that ``npti-export evaluate --json`` writes and the report is drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npti_export.errors import EvaluationError, shortened

FORMAT: Literal[1] = 1
_MOST_DIGITS = 300  # of a whole number, which has to fit into a float


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Interval = tuple[float, float]


class Estimate(_Part):
    """A mean with its 95% interval, see :func:`npti_export.evaluate.estimate.estimate`."""

    mean: float
    low: float
    high: float
    n: int = Field(ge=0, description="Questions, items or passages that it is a mean over")


class Condition(_Part):
    """Answers of one way to get a personality, scored by the unsteered model."""

    name: str = Field(description="Key, as in answers and judges: unsteered, steered, prompt-adjective, …")
    label: str
    kind: Literal["base", "steered", "prompt", "baseline", "null"]
    contrast: Estimate = Field(description="Nats per token, towards the wanted pole")
    gain: Estimate | None = Field(default=None, description="Contrast minus the unsteered one's, question by question")
    damage: float | None = Field(default=None, description="KL to the unsteered model on neutral text, nats a token")
    fluency: Estimate = Field(description="Log-likelihood per token under the plain question, unsteered model")
    perplexity: Estimate = Field(description="exp(-fluency): of the mean, with its interval")
    repetition: Estimate = Field(description="Share of an answer's word 3-grams that came before in it")
    distinct: Estimate = Field(description="Different word bigrams as a share of all, an answer")
    length: Estimate = Field(description="Tokens an answer")
    seconds: float = Field(default=0.0, description="What answering and scoring took")


class JudgeScores(_Part):
    """What one judge gave, 1 to 5, by condition."""

    judge: str
    trait: dict[str, Estimate]
    fluency: dict[str, Estimate]
    unusable: int = Field(description="Verdicts that could not be read, or did not come")


class Agreement(_Part):
    """How far two judges agree on the same answers."""

    judges: tuple[str, str]
    what: Literal["trait", "fluency"]
    spearman: float
    kappa: float = Field(description="Cohen's kappa, quadratic weights")
    n: int
    spearman_interval: Interval | None = Field(default=None, description="95%; None over too few questions")
    kappa_interval: Interval | None = Field(default=None, description="Likewise")


class JudgePart(_Part):
    """Judge models by the paper's protocol."""

    judges: list[JudgeScores]
    agreement: list[Agreement]


class Change(_Part):
    """A figure of the unsteered and of the steered model, and their difference, paired."""

    base: Estimate
    steered: Estimate
    change: Estimate


class InventoryPart(_Part):
    """Self-report items, answered by the probabilities of their options; 1 to 5, reverse-keyed items turned round."""

    source: str
    traits: dict[str, Change]


class Task(_Part):
    """One test of skill."""

    name: str
    source: str
    metric: str = Field(description="accuracy, exact match, …")
    score: Change


class CapabilityPart(_Part):
    """What steering does to what the model knows and can."""

    kl_neutral: Estimate = Field(description="KL(unsteered ‖ steered) in nats a token on neutral text, by passage")
    tasks: list[Task]


class FluencyPart(_Part):
    """The figures of a :class:`Condition` that say how well answers read, before and after."""

    log_likelihood: Change
    perplexity: Change
    repetition: Change
    distinct: Change
    length: Change


class ContrastPart(_Part):
    """The likelihood contrast of the trait that was steered, in nats per token towards the wanted pole."""

    personas: int = Field(description="Persona pairs that score each answer")
    base: Estimate
    steered: Estimate
    gain: Estimate
    null: Estimate | None = Field(
        description="Gain of as many random neurons or of random directions, the null trait; interval over the draws"
    )
    beyond_null: Estimate | None = Field(default=None, description="Gain beyond that, question by question, likewise")
    share_of_prompt: float | None = Field(description="Gain as a share of the better persona prompt's")
    share_interval: Interval | None = Field(
        default=None, description="95%, of that; None where the prompt's own gain is not clear of zero"
    )
    by_facet: dict[str, Estimate] = Field(description="Gain by facet")


class Answer(_Part):
    """One test question and what each condition made of it."""

    question: str
    facet: str | None
    topic: str | None
    answers: dict[str, str]
    contrast: dict[str, float]


class LayerShape(_Part):
    """What the rule does in one layer."""

    shift: int
    clamp: int
    constant: float = Field(description="Euclidean norm of the constant at the down projection's input")


class Distribution(_Part):
    """Activations of the pole's neurons under personas of both poles: a histogram."""

    edges: list[float]
    wanted: list[float] = Field(description="Share of activations in each bin, under the wanted pole")
    opposite: list[float]


class SweepPoint(_Part):
    """One setting of a sweep."""

    value: float | str
    gain: Estimate
    fluency: Estimate
    kl_neutral: Estimate | None = None


class Sweep(_Part):
    """An ablation: one setting varied, the others as they are."""

    setting: str = Field(description="gamma, threshold, parts, prompt tokens")
    points: list[SweepPoint]


class ParetoPoint(_Part):
    """One trial of the tuner, on search questions."""

    label: str
    gain: float
    damage: float = Field(description="KL(unsteered ‖ steered) on neutral text, nats a token")
    fluency: float
    on_front: bool
    chosen: bool


class Document(_Part):
    """A whole evaluation."""

    format: Literal[1] = FORMAT
    version: str
    artifact: dict[str, Any] = Field(description="path, format, bytes, sha256 (of several files: by name)")
    model: dict[str, Any] = Field(description="name, fingerprint, id, license of the unsteered model")
    traits: list[str] = Field(description="Poles with strengths, as in the artifact")
    poles: list[dict[str, str]] = Field(description="pole, name, description of each")
    recipe: dict[str, Any] | None
    fidelity: dict[str, float]
    settings: dict[str, Any] = Field(description="questions, answer_tokens, personas, seed, engine, …")
    seconds: dict[str, float]
    trait_contrast: ContrastPart
    judge: JudgePart | None
    inventory: InventoryPart | None
    fluency: FluencyPart
    capability: CapabilityPart
    cross_talk: dict[str, Estimate] | None = Field(
        description="Gain towards the + pole of each trait, the steered one included"
    )
    baselines: dict[str, Condition]
    conditions: list[Condition] = Field(description="Unsteered and steered first, then the baselines")
    answers: list[Answer]
    layers: list[LayerShape]
    distribution: Distribution | None = None
    sweeps: list[Sweep] = Field(default_factory=list)
    pareto: list[ParetoPoint] = Field(default_factory=list)

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_document(path: Path) -> Document:
    """Read what :meth:`Document.to_json` wrote.

    Raises:
        EvaluationError: unreadable, of another version, or not such a file; the fields are named.
    """
    try:
        raw = read_plain(path)
    except (OSError, ValueError, RecursionError) as error:
        reason = shortened(str(error), 200)
        raise EvaluationError(f"{path}: not an evaluation ({type(error).__name__}: {reason})") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise EvaluationError(f"{path}: not an evaluation of this version (format {FORMAT}); evaluate again")
    try:
        return Document.model_validate(raw)
    except ValidationError as error:
        raise EvaluationError(f"{path}: not an evaluation: {faults_of(error)}") from error


def read_plain(path: Path) -> Any:
    """JSON of finite numbers and of texts that can be written again.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
        RecursionError: it is nested too deeply.
    """
    raw = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()  # a number may be infinite, a text no text
    return raw


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def faults_of(error: ValidationError) -> str:
    """The first fields that are wrong, and why."""
    faults = (f"'{'.'.join(map(str, one['loc']))[:100]}': {one['msg'][:200]}" for one in error.errors()[:5])
    return "; ".join(faults)
