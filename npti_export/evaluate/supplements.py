"""What ``tune`` and ``ablate`` found out, in the JSON that they write, and how it becomes part of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npti_export.errors import EvaluationError, shortened
from npti_export.evaluate.document import (
    Condition,
    Document,
    Estimate,
    ParetoPoint,
    Sweep,
    faults_of,
    read_plain,
)
from npti_export.recipe import Recipe, recipe_from_json
from npti_export.traits import parse_recorded
from npti_export.version import __version__

FORMAT: Literal[1] = 1
PROMPT = "prompt"  # setting of the sweep that holds what prompts do to the unsteered model, on the same questions
_NAMED = 4  # settings that a sentence names; the others are counted

Steering = dict[Literal["select", "rule"], dict[str, Any]]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrialRecord(_Record):
    """One trial of the tuner, on search questions."""

    number: int
    label: str
    select: dict[str, Any] = Field(description="Of the recipe for the pole")
    rule: dict[str, Any] = Field(description="Likewise")
    gain: Estimate
    damage: Estimate = Field(description="KL(unsteered ‖ steered) on neutral text, nats a token")
    fluency: Estimate
    within: bool = Field(description="Whether the budget is kept")


class Confirmation(_Record):
    """What was picked, on test questions and on neutral text that no trial saw."""

    questions: int
    conditions: list[Condition] = Field(description="Unsteered, steered, persona prompt")
    kl_neutral: Estimate
    within: bool = Field(description="Whether the budget is kept here, too")
    before: int = Field(description="How often a pick of the same study was confirmed before")


class _About(_Record):
    format: Literal[1] = FORMAT
    version: str = __version__
    model: dict[str, Any] = Field(description="name, fingerprint")
    pole: str
    recipe: str = Field(description="Name of the recipe that was started from")
    settings: dict[str, Any] = Field(description="questions, answer_tokens, personas, seed, engine, …")
    base_fluency: float = Field(description="Of the unsteered answers to the same questions")

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


class TuningRecord(_About):
    """A search for settings."""

    kind: Literal["tuning"] = "tuning"
    budget: dict[str, float]
    trials: list[TrialRecord]
    failed: int = Field(description="Trials that gave no rule or no figures")
    pareto: list[ParetoPoint] = Field(description="All trials, in the same order")
    confirmation: Confirmation | None


class AblationRecord(_About):
    """One setting varied at a time."""

    kind: Literal["ablation"] = "ablation"
    steering: Steering | None = Field(default=None, description="Sections of the recipe that make the rule")
    sweeps: list[Sweep]
    notes: list[str] = Field(description="What was left out, and why")


_Kind = TypeVar("_Kind", TuningRecord, AblationRecord)


def read_tuning(path: Path) -> TuningRecord:
    """Read what ``tune --json`` wrote.

    Raises:
        EvaluationError: unreadable, or something else.
    """
    return _read(path, TuningRecord, "tune")


def read_ablation(path: Path) -> AblationRecord:
    """Read what ``ablate --json`` wrote.

    Raises:
        EvaluationError: unreadable, or something else.
    """
    return _read(path, AblationRecord, "ablate")


def _read(path: Path, kind: type[_Kind], command: str) -> _Kind:
    try:
        return kind.model_validate(read_plain(path))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        why = faults_of(error) if isinstance(error, ValidationError) else shortened(str(error), 200)
        raise EvaluationError(f"{path}: not what npti-export {command} --json of this version writes: {why}") from error


def check_same(record: TuningRecord | AblationRecord, path: Path, poles: list[str], fingerprint: str) -> None:
    """Raise unless a record is of a model and of one of the poles that an artifact steers towards.

    Raises:
        EvaluationError: another one's.
    """
    if record.model.get("fingerprint") != fingerprint:
        raise EvaluationError(f"{path}: is of another model ({record.model.get('name')}) than the artifact")
    if record.pole not in poles:
        raise EvaluationError(f"{path}: is of {record.pole}, and the artifact steers towards {' '.join(poles)}")


def steering(recipe: Recipe, pole: str) -> Steering:
    """What makes a recipe's rule for a pole, as JSON: its sections ``select`` and ``rule``."""
    whole = json.loads(recipe.for_pole(pole).to_json())
    return {"select": whole["select"], "rule": whole["rule"]}


def differs(record: TuningRecord | AblationRecord, recipe: Recipe | None, traits: Sequence[str]) -> str:
    """In a sentence, how the rule of sweeps, or the pick of a search, differs from an artifact's; else nothing.

    Args:
        record: of one of the poles.
        recipe: that the artifact was made with; None where that is not known.
        traits: poles with their strengths, as the artifact has them.
    """
    what = "The pick of the trials" if isinstance(record, TuningRecord) else "The sweeps' own rule"
    theirs = _picked(record) if isinstance(record, TuningRecord) else record.steering
    if isinstance(record, TuningRecord) and theirs is None:
        return "No trial was picked, so the file is none of them."
    strength = next((spec.strength for spec in map(parse_recorded, traits) if spec.pole == record.pole), None)
    if recipe is None or strength is None:
        return f"{what} cannot be compared with the file's: it holds none."
    if theirs is None:
        same = recipe.name == record.recipe
        return "" if same else f"{what} is of the recipe {record.recipe}, the file's of {recipe.name}."
    ours = steering(recipe, record.pole)
    found = [
        f"{section}.{name} {json.dumps(value)} instead of {json.dumps(ours[section].get(name))}"
        for section, values in theirs.items()
        for name, value in values.items()
        if ours.get(section, {}).get(name) != value
    ]
    other = record.settings.get("strength", 1.0)
    if not isinstance(other, int | float):
        return f"{what} has no strength that is a number."
    if other != strength:
        found.insert(0, f"strength {other:g} instead of {strength:g}")
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{what} is not the file's: {', '.join(found[:_NAMED])}{more}." if found else ""


def _picked(record: TuningRecord) -> Steering | None:
    for one, point in zip(record.trials, record.pareto, strict=True):
        if point.chosen:
            return {"select": one.select, "rule": one.rule}
    return None


def supplemented(document: Document, tuning: TuningRecord | None, ablation: AblationRecord | None) -> Document:
    """An evaluation with the trials of a search, and with sweeps; its settings say what these are of."""
    update: dict[str, Any] = {}
    settings = dict(document.settings)
    # a file without a rule has the model's recipe there
    recipe = recipe_from_json(json.dumps(document.recipe)) if document.recipe and document.layers else None
    if tuning is not None:
        update["pareto"] = tuning.pareto
        settings["trials"] = _about(tuning, differs(tuning, recipe, document.traits))
    if ablation is not None:
        update["sweeps"] = ablation.sweeps
        settings["sweeps"] = _about(ablation, differs(ablation, recipe, document.traits))
    return document.model_copy(update=update | ({"settings": settings} if update else {}))


def _about(record: TuningRecord | AblationRecord, note: str) -> dict[str, Any]:
    found = {"recipe": record.recipe, "split": "search"} | {
        name: record.settings[name] for name in ("split", "questions") if name in record.settings
    }
    return found | ({"note": note} if note else {})
