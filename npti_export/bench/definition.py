"""What a trait is: its name, what its two poles are called, and the facets that show it (``trait.toml``)."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from npti_export.bench.lines import PLACEHOLDER
from npti_export.errors import BenchError, shortened

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "trait.toml"
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
# Of a trait: no space, as artifacts record poles in a row.
TraitName = Annotated[str, StringConstraints(pattern=re.compile(r"\A[a-z][a-z0-9]*([_-][a-z0-9]+)*\Z"), max_length=64)]
Name = Annotated[str, StringConstraints(pattern=re.compile(r"\A[a-z][a-z0-9]*([ _-][a-z0-9]+)*\Z"), max_length=64)]
_MOST_FAULTS = 10  # that a message lists


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pole(_Table):
    """One end of a trait."""

    name: Name = Field(description="An adjective for somebody at this pole, as a prompt would say it")
    description: Text = Field(description="What somebody at this pole is like, in a sentence or two")


class Poles(_Table):
    """The two ends of a trait, ``+`` and ``-``."""

    high: Pole
    low: Pole


class Facet(_Table):
    """One side of a trait: what somebody at the high pole does, and what somebody at the low pole does."""

    name: Name
    high: Text
    low: Text


class TraitDefinition(_Table):
    """A contrast that a model can be steered along."""

    name: TraitName = Field(description="Of the trait, as in --trait NAME+")
    description: Text
    forbidden: tuple[Text, ...] = Field(default=(), description="Words that no question may hold, beside the names")
    poles: Poles
    facets: tuple[Facet, ...] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _distinct(self) -> TraitDefinition:
        names = [facet.name for facet in self.facets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"facets named twice: {', '.join(twice)}")
        if self.poles.high.name == self.poles.low.name:
            raise ValueError("poles.high.name and poles.low.name are the same")
        return self

    @property
    def facet_names(self) -> tuple[str, ...]:
        """Names of the facets, in order."""
        return tuple(facet.name for facet in self.facets)

    @property
    def digest(self) -> str:
        """SHA-256 of what it says; comments and layout of the file do not count."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def pole(self, sign: str) -> Pole:
        """The pole ``+`` or ``-``."""
        return self.poles.high if sign == "+" else self.poles.low


def check_name(name: str) -> None:
    """Raise unless a trait can have this name.

    Raises:
        BenchError: it cannot.
    """
    try:
        TypeAdapter(TraitName).validate_python(name)
    except ValidationError as error:
        raise BenchError(
            f"{shortened(name)}: cannot be a trait's name; use up to 64 lower-case letters, digits, - and _, "
            "beginning with a letter"
        ) from error


def placeholders(definition: TraitDefinition) -> list[str]:
    """The fields that ``bench new`` wrote and nobody has replaced, such as ``poles.high.name``."""
    return _unwritten("", definition.model_dump())


def _unwritten(field: str, value: object) -> list[str]:
    if isinstance(value, str):
        return [field] if value.upper().startswith(PLACEHOLDER) else []
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in _unwritten(f"{field}.{key}" if field else key, inner)]
    if isinstance(value, (list, tuple)):
        return [one for place, inner in enumerate(value, 1) for one in _unwritten(f"{field}[{place}]", inner)]
    return []


def read_definition(folder: Path) -> TraitDefinition:
    """Read ``trait.toml`` of a trait's folder.

    Raises:
        BenchError: missing, not TOML, an unknown or missing key, or a bad value; all faults are listed.
    """
    path = folder / FILE_NAME
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror}); a trait's folder needs one") from error
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise BenchError(f"{path}: not valid TOML: {shortened(str(error), 200)}") from error
    try:
        return TraitDefinition.model_validate(raw)
    except ValidationError as error:
        faults = (
            f"'{shortened('.'.join(map(str, one['loc'])) or 'trait', 100)[1:-1]}': {one['msg']}"
            for one in error.errors()[:_MOST_FAULTS]
        )
        raise BenchError(f"{path}: {'; '.join(faults)}") from error
