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
from npti_export.traits import Sign, TraitSpec


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
    ``f(d) = 1 / (1 + exp(-slope (d - center)))``. Adds ``gamma · strength · constant`` times the difference of the
    poles' mean inputs to the down projections, of all neurons or of those where it is large, see
    :func:`mean_difference`, and ``gamma · strength · matched`` times the constant of
    :mod:`npti_export.identify.matched`.

    Args:
        profile: of ``spec.trait``.
        spec: the pole and its strength, which multiplies gamma; a clamp is all or nothing.
        recipe: its ``select`` and ``rule`` sections, with what ``poles`` says of this one.

    Raises:
        ProfileError: a pole has no neuron, nothing is left that does anything, or the profile lacks the means.
    """
    recipe = recipe.for_pole(spec.pole)
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
    added = np.zeros(shift.shape)
    if settings.constant:
        added += settings.constant * mean_difference(profile, spec.sign, recipe)
    if settings.matched:
        added += settings.matched * _matched(profile, spec)
    added *= settings.gamma * spec.strength
    constant = added.astype(np.float32) if settings.constant or settings.matched else None
    outside = np.ones(len(shift), np.bool_)
    outside[layer_range(recipe, len(shift))] = False
    for part in (shift, clamp) if constant is None else (shift, clamp, constant):
        part[outside] = 0
    rule = SteeringRule(shift.astype(np.float32), clamp, constant)
    if rule.changed == 0:
        raise ProfileError(
            f"the rule for {spec} changes no neuron; set rule.shift, rule.clamp, rule.constant or rule.matched, lower "
            "select.threshold, rule.effect_size or rule.magnitude, or widen rule.first_layer to rule.last_layer"
        )
    return rule


def _matched(profile: NeuronProfile, spec: TraitSpec) -> npt.NDArray[np.float32]:
    found = profile.matched(spec.sign)
    if found is None:
        raise ProfileError(
            f"the profile of {profile.trait} does not hold the constant that rule.matched multiplies; identify again "
            f"with this recipe, or leave --profile out"
        )
    return found


def layer_range(recipe: Recipe, layers: int) -> slice:
    """The layers that a rule may touch: ``first_layer`` to ``last_layer`` of their number, rounded."""
    return slice(round(recipe.rule.first_layer * layers), round(recipe.rule.last_layer * layers))


def mean_difference(profile: NeuronProfile, sign: Sign, recipe: Recipe) -> npt.NDArray[np.float64]:
    """Difference of the mean down-projection inputs of the poles, wanted minus opposite, ``[layers, width]``.

    0 for neurons whose Cohen's d, the difference by the pooled standard deviation, is under ``rule.effect_size``, or
    whose difference is not larger than the ``rule.magnitude`` quantile of all neurons' (DPN-LE, arXiv 2604.27929: 0.8
    and 0.995).

    Raises:
        ProfileError: the profile does not hold the means.
    """
    if profile.mean_plus is None or profile.mean_minus is None or profile.deviation is None:
        raise ProfileError(
            f"the profile of {profile.trait} does not hold what the down projections read, which rule.constant needs: "
            "identify again with this version (a published profile and a mixture of experts have no such means)"
        )
    difference = profile.mean_plus.astype(np.float64) - profile.mean_minus
    size, settings = np.abs(difference), recipe.rule
    keeps = size >= settings.effect_size * profile.deviation
    if settings.magnitude:
        keeps &= size > np.quantile(size, settings.magnitude)
    return np.where(keeps, difference if sign == "+" else -difference, 0.0)


def compose(rules: Sequence[SteeringRule]) -> SteeringRule:
    """Several traits at once: shifts and constants add, clamps unite."""
    constants = [rule.constant for rule in rules if rule.constant is not None]
    constant = np.stack(constants).sum(axis=0, dtype=np.float64).astype(np.float32) if constants else None
    shift = np.stack([rule.shift for rule in rules]).sum(axis=0, dtype=np.float64)
    clamp: npt.NDArray[np.bool_] = np.stack([rule.clamp for rule in rules]).max(axis=0)
    return SteeringRule(shift.astype(np.float32), clamp, constant)
