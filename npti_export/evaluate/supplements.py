"""What ``tune`` and ``ablate`` found out, in the JSON that they write, and how it becomes part of an evaluation."""

from __future__ import annotations

import json
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
from npti_export.version import __version__

FORMAT: Literal[1] = 1


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


def supplemented(document: Document, tuning: TuningRecord | None, ablation: AblationRecord | None) -> Document:
    """An evaluation with the trials of a search, and with sweeps."""
    update: dict[str, Any] = {}
    if tuning is not None:
        update["pareto"] = tuning.pareto
    if ablation is not None:
        update["sweeps"] = ablation.sweeps
    return document.model_copy(update=update)
