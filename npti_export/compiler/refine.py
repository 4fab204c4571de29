"""Pass: refining the units of clamps, for many neurons at once: Levenberg's and Marquardt's method on their own gates.

A clamped neuron stays in the model here, as one more unit: its gate gets a bias, and the extra units add what is
missing to ``min(silu(g), 0)``. Its terms and theirs cancel, so this is for models whose MLPs are floats, where a
column and its copy are the same to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from npti_export.compiler.clamp import FLOOR, GRID, clamped, fit_clamps, gates_and_weights, silu
from npti_export.compiler.neurons import LayerRule, LayerSample
from npti_export.compiler.program import Indices, LayerProgram
from npti_export.compiler.shapes import STAYING, Shape

Doubles = npt.NDArray[np.float64]
_ROUNDS = 25
_LARGEST = 1.2  # of a factor: the neuron's own is 1
_SCALES = (0.25, 64.0)  # of a gate


class Clamps(NamedTuple):
    """Units of ``n`` clamps: ``silu(g + own) + sum_j alpha_j silu(scale_j g + bias_j)``.

    Attributes:
        own: ``[n]``.
        scale: ``[n, units]``.
        bias: likewise.
        alpha: likewise.
    """

    own: Doubles
    scale: Doubles
    bias: Doubles
    alpha: Doubles


def refine_clamps(rule: LayerRule, program: LayerProgram, sample: LayerSample) -> LayerProgram:
    """The program with each clamp's units refined under the neuron's own gates, the neuron being one of them.

    For models whose MLPs are floats. Where no shapes have as many units, the neuron is switched off instead.
    """
    units, off = program.copies, program.off
    if not len(off) or units not in STAYING:
        return fit_clamps(rule, program, sample)
    found = refined_clamps(sample, off, units)
    kept = program.picked(
        np.arange(program.copied - units * len(off)), np.ones(program.copied - units * len(off), bool)
    )

    def more(old: npt.NDArray[np.float32], new: Doubles) -> npt.NDArray[np.float32]:
        return np.concatenate([old, new.ravel()]).astype(np.float32)

    return replace(
        kept,
        source=np.concatenate([kept.source, np.repeat(off, units)]),
        gate_scale=more(kept.gate_scale, found.scale),
        gate_bias=more(kept.gate_bias, found.bias),
        up_scale=more(kept.up_scale, found.alpha),
        off=off[:0],
        biased=off,
        bias=found.own.astype(np.float32),
    )


def refined_clamps(sample: LayerSample, neurons: Indices, units: int) -> Clamps:
    """The best units of each neuron's clamp: every shape is solved for its factors, and the best one refined."""
    gate, weight = gates_and_weights(sample, neurons)
    count = len(neurons)
    points = np.concatenate([gate.T, np.tile(GRID, (count, 1))], axis=1)
    weights = np.concatenate([weight.T, np.tile(FLOOR, (count, 1))], axis=1)
    best, lowest = _solved(points, weights, STAYING[units][0])
    for shape in STAYING[units][1:]:
        found, cost = _solved(points, weights, shape)
        better = cost < lowest
        lowest[better] = cost[better]
        for old, new in zip(best, found, strict=True):
            old[better] = new[better]
    return refine(points, weights, best)


def _solved(points: Doubles, weights: Doubles, shape: Shape) -> tuple[Clamps, Doubles]:
    """Units of one shape with the factors that fit best, and what they cost, ``[n]``."""
    scale, (*bias, own) = np.array(shape[0]), shape[1]
    terms = silu(points[..., None] * scale + np.array(bias))
    left = clamped(points) - silu(points + own)
    weighted = terms * weights[..., None]
    normal = np.einsum("npj,npk->njk", weighted, terms)
    ridge = 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(len(scale))
    alpha = np.linalg.solve(normal + ridge, np.einsum("npj,np->nj", weighted, left)[..., None])[..., 0]
    alpha = np.clip(alpha, -_LARGEST, _LARGEST)
    cost = (weights * np.square((terms * alpha[:, None]).sum(-1) - left)).sum(1)
    count = len(points)
    tiled = (np.tile(np.maximum(scale, _SCALES[0]), (count, 1)), np.tile(bias, (count, 1)))
    return Clamps(np.full(count, own), *tiled, alpha), cost


def refine(gate: Doubles, weight: Doubles, start: Clamps) -> Clamps:
    """The nearest local optimum, never worse than ``start``.

    Args:
        gate: ``[n, points]``.
        weight: likewise, of the squared error at each point.
        start: where to begin.
    """
    units = start.scale.shape[1]
    state = np.concatenate([start.alpha, start.bias, np.log(start.scale), start.own[:, None]], axis=1)
    root, target = np.sqrt(weight), clamped(gate)
    left, slopes = _errors(state, gate, root, target)
    cost, damping = np.square(left).sum(1), np.full(len(state), 1e-3)
    for _ in range(_ROUNDS):
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
    return Clamps(state[:, -1], np.exp(scale), bias, alpha)


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
