"""The recipe: every choice of a run, typed, validated and without unknown keys."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from npti_export.architectures import Layout
from npti_export.compiler.kinds import parse_program
from npti_export.errors import RecipeError, shortened

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_MOST_FAULTS = 10  # that a message lists


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PromptSection(_Section):
    """How a persona and a question become a chat."""

    system: str = Field(description="System turn; must contain {persona}")
    user: str = Field(description="User turn; must contain {question}")

    @field_validator("system")
    @classmethod
    def _has_persona(cls, value: str) -> str:
        if "{persona}" not in value:
            raise ValueError("must contain {persona}")
        return value

    @field_validator("user")
    @classmethod
    def _has_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("must contain {question}")
        return value


class IdentifySection(_Section):
    """How responses are generated while neurons are counted."""

    questions: int = Field(ge=0, description="Search questions a trait; 0 takes all")
    seed: int = Field(ge=0, description="Pairs questions with personas")
    batch_size: int = Field(ge=1, le=4096, description="Sequences decoded together")
    max_new_tokens: int = Field(ge=2, le=65536, description="Longest answer, in tokens")
    repetition_penalty: float = Field(gt=0, le=10, description="Divides the logits of tokens seen before")
    until: Literal["stable", "all"] = Field(description="Stop once the selected neurons have settled, or ask all")
    overlap: float = Field(gt=0, le=1, description="Settled: expected overlap with the selection from all questions")
    floor: int = Field(ge=2, description="Questions asked in any case")
    matched_questions: int = Field(default=32, ge=1, description="Search questions that rule.matched is found on")


class SelectSection(_Section):
    """Which neurons belong to a pole."""

    threshold: float = Field(ge=0, le=1, description="Smallest |delta|")
    at_least: int = Field(ge=0, description="Neurons a pole taken even below the threshold, ranked by |delta|")
    at_most: int | None = Field(default=None, ge=1, description="Cap on the neurons of a pole; none lifts it")

    @model_validator(mode="after")
    def _cap_above_floor(self) -> SelectSection:
        if self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(
                f"at_least = {self.at_least} is more than at_most = {self.at_most}; set both, or at_most=none"
            )
        return self


class RuleSection(_Section):
    """The rule: the paper's shifts and clamps, and a constant as DPN-LE and mean shifts add it."""

    gamma: float = Field(gt=0, le=100, description="Strength: multiplies shifts and constants")
    percentile: float = Field(gt=0, lt=1, description="Quantile of the activation that scales a shift")
    slope: float = Field(gt=0, description="Slope of the weight f(delta)")
    center: float = Field(ge=0, le=1, description="|delta| at which the weight is one half")
    shift: bool = Field(description="Shift the wanted pole's neurons")
    clamp: bool = Field(description="Clamp the opposite pole's neurons")
    constant: float = Field(
        default=0.0, ge=0, le=100, description="Times the poles' difference of mean inputs of the down projections"
    )
    effect_size: float = Field(default=0.0, ge=0, description="Constants: smallest Cohen's d of that difference")
    magnitude: float = Field(default=0.0, ge=0, lt=1, description="Constants: quantile that its size must exceed")
    matched: float = Field(
        default=0.0, ge=0, le=100, description="Times the constant that moves the residual stream as personas do"
    )
    first_layer: float = Field(default=0.0, ge=0, le=1, description="Where the rule begins, as a share of the layers")
    last_layer: float = Field(default=1.0, ge=0, le=1, description="Where it ends, likewise")

    @model_validator(mode="after")
    def _does_something(self) -> RuleSection:
        if self.first_layer >= self.last_layer:
            raise ValueError(f"first_layer = {self.first_layer} must lie below last_layer = {self.last_layer}")
        if not (self.by_neurons or self.matched):
            raise ValueError(
                "shift, clamp, constant and matched are all off, so the rule would do nothing; switch one on"
            )
        return self

    @property
    def by_neurons(self) -> bool:
        """Whether anything but ``matched`` is asked for, so that neurons have to be identified."""
        return self.shift or self.clamp or self.constant > 0


class CompileSection(_Section):
    """How the rule becomes extra neurons."""

    program: str = Field(default="exact", description="exact, bias, lowrank:R, budget:N% or kl:X; for GGUF output")
    clamp_units: float = Field(ge=2, le=5, description="Extra neurons for one clamp, on average, where written out")
    calibration_tokens: int = Field(default=768, ge=64, le=65536, description="Tokens that programs are fitted on")
    layout: Layout = Field(default="uniform", description="GGUF: all layers equally wide, or each as it needs")

    @property
    def basis_units(self) -> int:
        """Extra neurons for one clamp where nothing is fitted, see :func:`npti_export.compiler.clamp.clamp_basis`."""
        return max(3, math.ceil(self.clamp_units))

    @field_validator("program")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return str(parse_program(value))
        except RecipeError as error:
            raise ValueError(str(error)) from error


class VerifySection(_Section):
    """How the written file is measured, and what is accepted."""

    prompts: int = Field(ge=1, description="Held-out test questions")
    answer_tokens: int = Field(ge=1, le=4096, description="Tokens of the steered answer compared after each prompt")
    kl_limit_float: float = Field(gt=0, description="Limit in nats for F32 and F16 bases")
    kl_limit_quantised: float = Field(gt=0, description="Limit in nats for other bases")
    kl_limit_floor_ratio: float = Field(ge=1, description="Limit as a multiple of the runtime floor, if larger")
    kl_share: float = Field(
        default=0.5, gt=0, le=1, description="Limit for programs that approximate: of the unsteered file's KL"
    )
    kl_floor_cap: float = Field(gt=0, description="Largest believable runtime floor in nats")


class PoleSection(_Section):
    """What differs for one pole: keys of ``select`` and ``rule``."""

    select: dict[str, Any] = Field(default_factory=dict)
    rule: dict[str, Any] = Field(default_factory=dict)


class Recipe(_Section):
    """Every choice of a run. Immutable; :func:`load_recipe` reads one."""

    name: str
    description: str = ""
    tuned_for: str | None = Field(default=None, description="Fingerprint of the model this was tuned for")
    prompt: PromptSection
    identify: IdentifySection
    select: SelectSection
    rule: RuleSection
    compile: CompileSection
    verify: VerifySection
    poles: dict[str, PoleSection] = Field(default_factory=dict, description="By pole, such as extraversion+")

    @model_validator(mode="after")
    def _poles_are_valid(self) -> Recipe:
        for pole in self.poles:
            self.for_pole(pole)
        return self

    def for_pole(self, pole: str) -> Recipe:
        """This recipe with what ``poles`` says of one pole, such as ``extraversion+``, in its place.

        Raises:
            ValueError: an unknown key or a bad value there.
        """
        special = self.poles.get(pole)
        if special is None:
            return self
        select = SelectSection.model_validate(self.select.model_dump() | special.select)
        rule = RuleSection.model_validate(self.rule.model_dump() | special.rule)
        return self.model_copy(update={"select": select, "rule": rule, "poles": {}})

    def to_json(self) -> str:
        """The resolved recipe as compact JSON with sorted keys, for reports, metadata and cache keys."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside it in a checkout."""
    packaged = Path(str(files("npti_export"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name or any recipe by path, and apply ``section.key=value`` overrides.

    A recipe may start with ``extends = "name"`` and give only what differs.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key or a bad value; all faults are listed.
    """
    source, raw = _read(name_or_path, ())
    for override in overrides:
        _apply(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(source, error)) from error


def recipe_from_json(text: str, overrides: Sequence[str] = ()) -> Recipe:
    """A resolved recipe as :meth:`Recipe.to_json` wrote it, with overrides.

    Raises:
        RecipeError: not one, or of a version that had other keys.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = shortened(str(error), 200)
        raise RecipeError(f"the recipe inside the artifact is not JSON: {reason}; give one by --recipe") from error
    if not isinstance(raw, dict):
        raise RecipeError("the recipe inside the artifact is no JSON object; give one by --recipe")
    for override in overrides:
        _apply(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain("inside the artifact", error) + "; give one by --recipe") from error


def select_recipe(
    requested: str | None, fingerprint: str, overrides: Sequence[str] = (), *, neurons: bool = False
) -> Recipe:
    """The requested recipe, or else the shipped one tuned for the model, or else ``npti``.

    Args:
        requested: a name or path; None decides by ``fingerprint``.
        fingerprint: the model's fingerprint, see :mod:`npti_export.models`.
        overrides: ``section.key=value`` strings.
        neurons: None decides among those that shift or clamp neurons.
    """
    if requested is not None:
        return load_recipe(requested, overrides)
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if recipe.tuned_for == fingerprint and (not neurons or recipe.rule.shift or recipe.rule.clamp):
            return load_recipe(name, overrides)
    return load_recipe("npti", overrides)


def _read(name_or_path: str, seen: tuple[Path, ...]) -> tuple[str, dict[str, Any]]:
    # a recipe that another one extends by path is looked for beside that one
    path = (seen[-1].parent if seen else Path()) / name_or_path
    if path.suffix != ".toml":
        path = recipe_folder() / f"{name_or_path}.toml"
        if "/" in name_or_path or not path.name.isprintable() or len(path.name) > 200 or not path.is_file():
            there = ", ".join(shipped_recipes())
            raise RecipeError(f"recipe {shortened(name_or_path)}: not shipped; there are {there}")
    try:
        path = path.resolve()
        if path in seen:
            raise RecipeError(f"{path}: 'extends' goes round in a circle")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{shortened(name_or_path, 200)}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits, and of names with zeros
        reason = shortened(str(error), 200)
        raise RecipeError(f"{shortened(name_or_path, 200)}: not valid TOML: {reason}") from error
    parent = raw.pop("extends", None)
    if parent is None:
        return name_or_path, raw
    if not isinstance(parent, str):
        raise RecipeError(f"{name_or_path}: 'extends' must be the name of a recipe")
    _, merged = _read(parent, (*seen, path))
    return name_or_path, _merge(merged, raw)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _apply(raw: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or len(keys) > 2 or not all(keys):
        raise RecipeError(f"--set {shortened(override)}: not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    section = raw
    for key in keys[:-1]:
        below = section.get(key, {})
        if not isinstance(below, Mapping):
            raise RecipeError(f"--set {shortened(override)}: {shortened(key)} is a single value, not a section")
        section[key] = dict(below)
        section = section[key]
    section[keys[-1]] = None if value == "none" else value
    if len(keys) == 2 and isinstance(raw.get("poles"), Mapping):  # what is asked for now holds for every pole
        raw["poles"] = {pole: _without(special, *keys) for pole, special in raw["poles"].items()}


def _without(special: Any, section: str, key: str) -> Any:
    below = special.get(section) if isinstance(special, Mapping) else None
    if not isinstance(below, Mapping):
        return special
    return {**special, section: {name: value for name, value in below.items() if name != key}}


def _explain(source: str, error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        where = shortened(".".join(str(part) for part in fault["loc"]), 100).strip("'\"")
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown key '{where}'")
        else:
            faults.append(
                f"'{where}': {fault['msg'].removeprefix('Value error, ')} (got {shortened(fault.get('input'))})"
            )
    more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
    return f"recipe {source}: " + "; ".join(faults[:_MOST_FAULTS]) + more
