"""The notation of programs: what a user is ready to pay, or wants to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from npti_export.errors import RecipeError, shortened

Name = Literal["exact", "bias", "lowrank", "budget", "kl"]
_FORMS = "exact, bias, lowrank:R (units), budget:N% (extra width) or kl:X (nats)"


@dataclass(frozen=True)
class ProgramKind:
    """A parsed ``--program``.

    Attributes:
        name: ``exact`` writes the rule out; ``bias`` adds no neuron; ``lowrank`` adds ``value`` units a layer;
            ``budget`` as much extra width as ``value`` percent; ``kl`` as little as keeps KL(rule ‖ program) under
            ``value``.
        value: 0 where there is none.
    """

    name: Name
    value: float = 0.0

    @property
    def approximates(self) -> bool:
        """Whether it may leave out a part of the rule."""
        return self.name != "exact"

    def __str__(self) -> str:
        number = repr(self.value).removesuffix(".0")  # as few digits as give it back
        values = {"lowrank": f":{number}", "budget": f":{number}%", "kl": f":{number}"}
        return self.name + values.get(self.name, "")


def parse_program(text: str) -> ProgramKind:
    """Read the notation.

    Raises:
        RecipeError: not a program.
    """
    name, colon, value = text.strip().partition(":")
    if name in ("exact", "bias") and not colon:
        return ProgramKind("exact" if name == "exact" else "bias")
    try:
        number = float(value.removesuffix("%") if name == "budget" else value)
    except ValueError:
        number = math.nan
    if name == "lowrank" and 1 <= number < math.inf and number == int(number):
        return ProgramKind("lowrank", number)
    if name == "budget" and value.endswith("%") and 0 <= number <= 1000:
        return ProgramKind("budget", number)
    if name == "kl" and 0 < number < math.inf:
        return ProgramKind("kl", number)
    raise RecipeError(f"program {shortened(text)}: is none of {_FORMS}")
