"""What a user asked for: the fields of a job, with nothing checked yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from npti_export.distribute.plan import Distribution
from npti_export.endings.base import Format
from npti_export.loader import RuntimeSettings
from npti_export.rule_io import Where
from npti_export.traits import TraitSpec


@dataclass(frozen=True)
class Job:
    """What a user asked for.

    Attributes:
        traits: poles to steer towards; empty where ``rule_from`` says it.
        out: what to write; None stops after the profile.
        format: of ``out``.
        rule_from: an adapter, steered checkpoint or steered GGUF whose rule is used again.
        model: see :func:`npti_export.models.resolve_model`.
        base: the GGUF to bake into, where ``model`` is not one.
        converter: llama.cpp's, for a ``model`` that is a directory and no ``base``; None looks for one.
        requantize: type that llama.cpp first quantises the GGUF to.
        imatrix: importance matrix of the model for that, see :func:`npti_export.gguf.imatrix.read_imatrix`.
        base_id: hub id to record as the base model.
        where: positions that an adapter steers, ``all`` or ``response``; None takes the earlier artifact's, or all.
        checkpoint_dtype: of the weights of a GGUF's steered checkpoint.
        push_to: hub repository for the result.
        private: whether a new repository is private.
        evaluation: of the same rule, for the card of ``push_to``.
        recipe: name or path; None picks by model.
        overrides: ``section.key=value`` strings.
        profiles: saved profiles to re-use.
        save_profile: where to keep the profile.
        report: where the caller will write the report; only checked here.
        bench: instead of the shipped bench, see :func:`npti_export.benches.load_benches`.
        trait_dirs: folders of traits of the user's own that ``rule_from`` records by name.
        any_model: accept a profile or rule of another model of the same shape.
        force: replace existing outputs.
        cache: folder of resumable state; None keeps none.
        resume: whether something has to be kept of an earlier run of the same job.
        runtime: how the model runs.
        distribution: the workers that identify; None: this process.
    """

    traits: tuple[TraitSpec, ...]
    out: Path | None
    format: Format = "gguf"
    rule_from: Path | None = None
    model: str | None = None
    base: Path | None = None
    converter: Path | None = None
    requantize: str | None = None
    imatrix: Path | None = None
    base_id: str | None = None
    where: Where | None = None
    checkpoint_dtype: str | None = None
    push_to: str | None = None
    private: bool = False
    evaluation: Path | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    profiles: tuple[Path, ...] = ()
    save_profile: Path | None = None
    report: Path | None = None
    bench: Path | None = None
    trait_dirs: tuple[Path, ...] = ()
    any_model: bool = False
    force: bool = False
    cache: Path | None = None
    resume: bool = False
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    distribution: Distribution | None = None
