"""What a steered model is compared with: other methods on the same model, at the same damage, and chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npti_export.errors import ProfileError
from npti_export.evaluate.capability.neutral import NeutralText
from npti_export.evaluate.engine import Engine
from npti_export.profile import NeuronProfile
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule, build_rule
from npti_export.traits import TraitSpec

METHODS = {
    "npti": "NPTI, the paper's settings",
    "dpn-le": "DPN-LE",
    "dpn-le-any": "DPN-LE, any effect size",
    "mean-shift": "Mean-difference control vector",
}
_RECIPES = {"dpn-le-any": ("dpn-le", ["rule.effect_size=0"])}  # of those that are not a recipe by their own name
NULL = "null"
LORA = "fine-tuned"  # of :mod:`npti_export.evaluate.finetune`; it has no strength to be levelled by
_STEPS = 8  # of the search for a strength
_LEAST, _MOST = 1 / 32, 32.0
_NEAR = 0.15  # of the wanted damage, where the search ends; beyond it a method's label says that it is not at it
_NOTHING = 1e-9  # nats: rounding may bring a distance of nothing below 0


@dataclass(frozen=True)
class Levelled:
    """A method at the strength at which it does as much damage as what it is compared with.

    Attributes:
        rule: at that strength.
        strength: that the method's own rule was multiplied by.
        damage: KL(unsteered ‖ steered) on neutral text, in nats a token.
    """

    rule: SteeringRule
    strength: float
    damage: float


def off_level(damage: float, wanted: float) -> str:
    """How a damage that is not the wanted one is told; empty where it is near enough."""
    ratio = damage / max(wanted, _NOTHING)
    return "" if abs(ratio - 1) <= _NEAR else f"at {ratio:.2g} times the damage"


def scaled(rule: SteeringRule, strength: float) -> SteeringRule:
    """A rule with its shifts and constants multiplied; clamps are all or nothing."""
    factor = np.float32(strength)
    return SteeringRule(rule.shift * factor, rule.clamp, None if rule.constant is None else rule.constant * factor)


def level(
    engine: Engine, rule_at: Callable[[float], SteeringRule], neutral: NeutralText, damage: float, most: float = _MOST
) -> Levelled:
    """Find the strength of a method at which it is ``damage`` away from the unsteered model on neutral text.

    Bisection of the logarithm, between 1/32 and ``most`` times the method's own strength; the nearest that was tried is
    taken, also where clamps, which have no strength, do more damage than that alone.

    Args:
        engine: runs rules.
        rule_at: the method's rule at a strength.
        neutral: passages, with what the unsteered model predicts.
        damage: mean KL in nats a token.
        most: largest strength.
    """
    low, high = np.log(_LEAST), np.log(most)
    best: Levelled | None = None
    at = 0.0
    for _ in range(_STEPS):
        strength = float(np.exp(at))
        rule = rule_at(strength)
        with engine.steered(rule) as runtime:
            found = max(float(neutral.kl(runtime).mean()), _NOTHING)
        if best is None or abs(np.log(found / damage)) < abs(np.log(best.damage / damage)):
            best = Levelled(rule, strength, found)
        if abs(found / damage - 1) < _NEAR:
            break
        low, high = (at, high) if found < damage else (low, at)
        guess = at + np.log(damage / found) / 2  # KL grows with about the square of the strength
        at = float(guess if low < guess < high else (low + high) / 2)
    assert best is not None
    return best


def method_rule(name: str, profile: NeuronProfile, spec: TraitSpec) -> SteeringRule:
    """The rule of a method of :data:`METHODS` at its recipe's own strength.

    DPN-LE's limit on the effect size (Cohen's d of 0.8) is reached by no neuron of some models, the embedded default
    among them for most traits; ``dpn-le-any`` is the method without it.

    Raises:
        ProfileError: the profile lacks what the method reads, or the method selects no neuron.
    """
    recipe = load_recipe(*_RECIPES.get(name, (name, [])))
    return build_rule(profile, TraitSpec(spec.trait, spec.sign), recipe)


def null_rule(rule: SteeringRule, seed: int) -> SteeringRule:
    """The same numbers at random neurons of the same layers: what steering does that has nothing to do with the trait.

    Shifts and clamps move to neurons that are drawn anew; constants are shuffled among neurons and get random signs.

    Raises:
        ProfileError: the rule does nothing.
    """
    if not rule.changed:
        raise ProfileError("the rule does nothing, so there is nothing to compare with chance")
    rng = np.random.default_rng(seed)
    shift, clamp = np.zeros_like(rule.shift), np.zeros_like(rule.clamp)
    constant = None if rule.constant is None else np.zeros_like(rule.constant)
    for layer in range(len(shift)):
        order = rng.permutation(shift.shape[1])
        shift[layer], clamp[layer] = rule.shift[layer, order], rule.clamp[layer, order]
        if constant is not None and rule.constant is not None:
            signs = rng.choice(np.array([-1, 1], np.float32), shift.shape[1])
            constant[layer] = rule.constant[layer, order] * signs
    return SteeringRule(shift, clamp, constant)
