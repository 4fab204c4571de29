"""Pass: refining the units of clamps, for many neurons at once: Levenberg's and Marquardt's method on their own gates.

A clamped neuron stays in the model here, as one more unit: its gate gets a bias, and the extra units add what is
missing to ``min(silu(g), 0)``. Its terms and theirs cancel, so this is for models whose MLPs are floats, where a
column and its copy are the same to the bit.
"""

from __future__ import annotations

import numpy as np

from npti_export.compiler.clamp import (
    Clamps,
    Doubles,
    Gates,
    clamped,
    fit_clamps,
    gates_of,
    keep_better,
    silu,
    solved,
    with_clamps,
)
from npti_export.compiler.neurons import LayerRule, LayerSample
from npti_export.compiler.program import LayerProgram
from npti_export.compiler.shapes import STAYING

_ROUNDS = 25
_LARGEST = 1.2  # of a factor: the neuron's own is 1
_SCALES = (0.25, 64.0)  # of a gate


def refine_clamps(
    rule: LayerRule, program: LayerProgram, sample: LayerSample, *, units: int = 0, rounds: int = _ROUNDS
) -> LayerProgram:
    """Pass: each clamp's units refined under the neuron's own gates, the neuron being one of them.

    For models whose MLPs are floats. Where no shapes have as many units, the neuron is switched off instead.

    Args:
        rule: of the layer.
        program: with clamps written out.
        sample: calibration tokens.
        units: of a clamp beside the neuron; 0 for as many as the program has.
        rounds: of refining; 0 for the shapes as they are.
    """
    units = units or program.copies
    if not len(program.off) or units not in STAYING:
        return fit_clamps(rule, program, sample, units=units)
    gates = gates_of(sample, program.off)
    found, _ = refine(gates, fitted_staying(gates, units), rounds)
    return with_clamps(program, found)


def fitted_staying(gates: Gates, units: int) -> Clamps:
    """The best shape for each neuron, solved for its factors."""
    count = len(gates.gate)
    nothing = np.zeros((count, units))
    best, lowest = Clamps(np.zeros(count), nothing, nothing.copy(), nothing.copy()), np.full(count, np.inf)
    for scale, (*bias, own) in STAYING[units]:
        tiled = (np.tile(np.maximum(scale, _SCALES[0]), (count, 1)), np.tile(bias, (count, 1)), nothing)
        left = clamped(gates.gate) - silu(gates.gate + own)
        keep_better(best, lowest, *solved(gates, Clamps(np.full(count, own), *tiled), left, _LARGEST))
    return best


def refine(gates: Gates, start: Clamps, rounds: int = _ROUNDS) -> tuple[Clamps, Doubles]:
    """The nearest local optimum, never worse than ``start``, of neurons that stay, and what it costs, ``[n]``."""
    units, gate = start.scale.shape[1], gates.gate
    state = np.concatenate([start.alpha, start.bias, np.log(start.scale), start.own[:, None]], axis=1)
    root, target = np.sqrt(gates.weight), clamped(gate)
    left, slopes = _errors(state, gate, root, target)
    cost, damping = np.square(left).sum(1), np.full(len(state), 1e-3)
    for _ in range(rounds):
        normal = np.einsum("npi,npj->nij", slopes, slopes)
        right = np.einsum("npi,np->ni", slopes, left)
        ridge = damping[:, None] * np.einsum("nii->ni", normal) + 1e-14
        step = np.linalg.solve(normal + ridge[..., None] * np.eye(state.shape[1]), -right[..., None])[..., 0]
        tried = state + step
        tried[:, :units] = np.clip(tried[:, :units], -_LARGEST, _LARGEST)
        tried[:, 2 * units : -1] = np.clip(tried[:, 2 * units : -1], *np.log(_SCALES))
        new_left, new_slopes = _errors(tried, gate, root, target)
        new_cost = np.square(new_left).sum(1)
        better = new_cost < cost
        for old, new in ((state, tried), (left, new_left), (slopes, new_slopes), (cost, new_cost)):
            old[better] = new[better]
        damping = np.where(better, np.maximum(damping / 3, 1e-9), np.minimum(damping * 4, 1e6))
    alpha, bias, scale = (state[:, part * units : (part + 1) * units] for part in range(3))
    return Clamps(state[:, -1], np.exp(scale), bias, alpha), cost


def _errors(state: Doubles, gate: Doubles, root: Doubles, target: Doubles) -> tuple[Doubles, Doubles]:
    """Weighted errors ``[n, points]`` and their slopes ``[n, points, parameters]``."""
    units = state.shape[1] // 3
    alpha, bias, scale = (state[:, None, part * units : (part + 1) * units] for part in range(3))
    scale = np.exp(scale)
    inner = gate[..., None] * scale
    value, slope = _silu_and_slope(inner + bias)
    own, own_slope = _silu_and_slope(gate + state[:, -1:])
    errors = (value * alpha).sum(-1) + own - target
    steep = slope * alpha
    slopes = np.concatenate([value, steep, steep * inner, own_slope[..., None]], axis=-1)
    return errors * root, slopes * root[..., None]


def _silu_and_slope(z: Doubles) -> tuple[Doubles, Doubles]:
    """SiLU and its derivative."""
    gate = 1 / (1 + np.exp(-np.clip(z, -700, None)))
    return z * gate, gate * (1 + z * (1 - gate))
