"""The induction rule: the definition of correct for everything that is compiled from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.errors import ProfileError
from npti_export.identify.select import pole_neurons
from npti_export.profile import NeuronProfile
from npti_export.recipe import Recipe
from npti_export.traits import TraitSpec


@dataclass(frozen=True)
class SteeringRule:
    """Per layer and neuron: ``a ← where(clamp, min(a, 0), a) + shift`` (paper, neuron-based induction).

    Then the input of the down projection, ``a ⊙ up``, gets ``constant`` added, which is how DPN-LE (arXiv 2604.27929)
    steers.

    Attributes:
        shift: ``[layers, width]`` float32, gamma folded in, 0 where nothing is added.
        clamp: ``[layers, width]`` bool.
        constant: ``[layers, width]`` float32, or None where nothing is added there.

    Raises:
        ProfileError: shapes that differ, or a value that is not finite.
    """

    shift: npt.NDArray[np.float32]
    clamp: npt.NDArray[np.bool_]
    constant: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.shift.shape != self.clamp.shape or self.shift.ndim != 2:
            raise ProfileError(f"shift {self.shift.shape} and clamp {self.clamp.shape} must be equal matrices")
        if not np.isfinite(self.shift).all():
            raise ProfileError("a shift is not finite; the profile is damaged, identify again")
        if self.constant is not None and self.constant.shape != self.shift.shape:
            raise ProfileError(f"constant {self.constant.shape} and shift {self.shift.shape} must be equal matrices")
        if self.constant is not None and not np.isfinite(self.constant).all():
            raise ProfileError("a constant is not finite; the rule is damaged, make it again")

    @property
    def shifted(self) -> int:
        """Number of neurons with a shift."""
        return int(np.count_nonzero(self.shift))

    @property
    def clamped(self) -> int:
        """Number of neurons with a clamp."""
        return int(np.count_nonzero(self.clamp))

    @property
    def constants(self) -> int:
        """Number of neurons with a constant."""
        return 0 if self.constant is None else int(np.count_nonzero(self.constant))

    @property
    def changed(self) -> int:
        """Number of neurons that anything is done to, one with several counted for each."""
        return self.shifted + self.clamped + self.constants


def build_rule(profile: NeuronProfile, spec: TraitSpec, recipe: Recipe) -> SteeringRule:
    """The rule that moves a model towards one pole.

    Clamps the opposite pole's neurons and shifts the wanted pole's by ``gamma · strength · a95 · f(|delta|)`` with
    ``f(d) = 1 / (1 + exp(-slope (d - center)))``.

    Args:
        profile: of ``spec.trait``.
        spec: the pole and its strength, which multiplies gamma; a clamp is all or nothing.
        recipe: its ``select`` and ``rule`` sections.

    Raises:
        ProfileError: a pole has no neuron, or neither shift nor clamp does anything.
    """
    select, settings = recipe.select, recipe.rule
    limits = (select.threshold, select.at_least, select.at_most)
    shift = np.zeros(profile.p_plus.shape, np.float64)
    clamp = np.zeros(profile.p_plus.shape, np.bool_)
    if settings.shift:
        wanted = pole_neurons(profile, spec.sign, *limits)
        weight = 1 / (
            1 + np.exp(-settings.slope * (np.abs(profile.delta[wanted].astype(np.float64)) - settings.center))
        )
        shift[wanted] = settings.gamma * spec.strength * profile.a95(spec.sign)[wanted] * weight
    if settings.clamp:
        clamp[pole_neurons(profile, "-" if spec.sign == "+" else "+", *limits)] = True
    rule = SteeringRule(shift.astype(np.float32), clamp)
    if rule.shifted + rule.clamped == 0:
        raise ProfileError(
            f"the rule for {spec} changes no neuron; set rule.shift or rule.clamp, or lower select.threshold"
        )
    return rule


def compose(rules: Sequence[SteeringRule]) -> SteeringRule:
    """Several traits at once: shifts and constants add, clamps unite."""
    constants = [rule.constant for rule in rules if rule.constant is not None]
    constant = np.stack(constants).sum(axis=0, dtype=np.float64).astype(np.float32) if constants else None
    shift = np.stack([rule.shift for rule in rules]).sum(axis=0, dtype=np.float64)
    clamp: npt.NDArray[np.bool_] = np.stack([rule.clamp for rule in rules]).max(axis=0)
    return SteeringRule(shift.astype(np.float32), clamp, constant)
