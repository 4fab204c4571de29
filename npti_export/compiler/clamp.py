"""A clamp as a sum of SiLUs: ``min(silu(g), 0) ≈ Σ alpha_j silu(scale_j g + bias_j)``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from npti_export.compiler.neurons import LayerRule, LayerSample
from npti_export.compiler.program import Indices, LayerProgram
from npti_export.compiler.shapes import SHAPES

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClampBasis:
    """Units that stand for one clamp.

    Attributes:
        scale: ``[units]``, powers of two, so that multiplying a gate row by one rounds nothing.
        bias: ``[units]``.
        alpha: ``[units]``, at most 0.5 in size.
        worst: largest error over ``|g| <= 60``.
        rms: root mean square error where ``g`` is standard normal.
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    alpha: tuple[float, ...]
    worst: float
    rms: float

    def __call__(self, gate: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The sum at gates ``[…]``, in float64."""
        z = np.multiply.outer(np.asarray(gate, np.float64), self.scale) + self.bias
        return np.asarray((np.asarray(self.alpha) * z / (1 + np.exp(-np.clip(z, -700, None)))).sum(-1))


# Fitted under a standard normal gate, for where no model is at hand; alphas and biases as first published here.
_BASES: dict[int, ClampBasis] = {
    3: ClampBasis(
        (4.0, 8.0, 8.0),
        (3.7748486565444814, -0.7247766286084528, 44.56424989356241),
        (0.08234182360924627, -0.033630361378684664, -0.007538249547865194),
        worst=0.0242,
        rms=0.0084,
    ),
    4: ClampBasis(
        (4.0, 4.0, 4.0, 8.0),
        (5.302089683087676, 1.9316611653418299, 20.746741240195487, 0.012330908019568909),
        (0.04344297626376174, 0.07115345102844224, -0.017634525061581422, -0.048485117020459295),
        worst=0.0295,
        rms=0.0033,
    ),
    5: ClampBasis(
        (2.0, 2.0, 8.0, 8.0, 8.0),
        (1.8142470129302837, -4.22007575132933, 0.8014679806661824, 0.9548708072490147, 43.091794391336244),
        (
            0.17067189269201313,
            0.0070182552725775805,
            -0.4523770219995703,
            0.4152247644648402,
            -0.007272042796914509,
        ),
        worst=0.0246,
        rms=0.0022,
    ),
}


def clamp_basis(units: int) -> ClampBasis:
    """The basis of a number of units."""
    return _BASES[units]


GRID = np.concatenate([np.linspace(-60, -12.2, 40), np.linspace(-12, 12, 481), np.linspace(12.2, 60, 40)])
# Weight of gates that no calibration token had; those that they had weigh 1 in all.
FLOOR = 1e-4 * np.gradient(GRID)
_LARGEST = 0.5  # as in the fit of the shapes: larger terms that cancel would be unbalanced by a float16 block scale


def fit_clamps(rule: LayerRule, program: LayerProgram, sample: LayerSample, *, rounding: float = 0.0) -> LayerProgram:
    """Pass: each clamp's units fitted to the gates that its neuron had, weighted by the up projection's squares.

    Of the shapes with as many units the best is taken for each neuron, its factors being the solution of a weighted
    least-squares problem; a small weight on all other gates bounds the error there. Terms that cancel are large beside
    their sum, and each is rounded with its own column, so their squares count as well, times that of ``rounding``.

    Args:
        rule: of the layer.
        program: with clamps written out.
        sample: calibration tokens.
        rounding: relative error of a column in the file's type, 0 for floats.
    """
    del rule  # the program says which neurons are clamped
    if not len(program.off) or program.copies not in SHAPES:
        return program
    gate, weight = gates_and_weights(sample, program.off)
    basis = clamp_basis(program.copies)
    found = [np.tile(values, (len(program.off), 1)) for values in (basis.scale, basis.bias, basis.alpha)]
    noise = rounding**2
    best = _cost(gate, weight, noise, *found)
    for shape in SHAPES[program.copies]:
        scale, bias = (np.tile(values, (len(program.off), 1)) for values in shape)
        alpha = _solve(gate, weight, noise, np.array(shape[0]), np.array(shape[1]))
        cost = np.where(np.abs(alpha).max(1) <= _LARGEST, _cost(gate, weight, noise, scale, bias, alpha), np.inf)
        better = cost < best
        for old, new in zip(found, (scale, bias, alpha), strict=True):
            old[better] = new[better]
        best[better] = cost[better]
    first = program.copied - program.copies * len(program.off)
    before = (program.gate_scale, program.gate_bias, program.up_scale)
    fitted = [
        np.concatenate([old[:first], new.ravel()]).astype(np.float32) for old, new in zip(before, found, strict=True)
    ]
    return replace(program, gate_scale=fitted[0], gate_bias=fitted[1], up_scale=fitted[2])


def worst_clamp(program: LayerProgram) -> float:
    """The largest error of a clamp in a program, over gates up to 60 in size; 0 if none is written out in units."""
    units = np.flatnonzero(program.gate_scale != 0)  # those of shifts have constant gates
    neurons = np.unique(program.source[units])
    if not len(neurons):
        return 0.0
    total = np.zeros((len(GRID), len(neurons)))
    for unit in units.tolist():
        place = np.searchsorted(neurons, program.source[unit])
        gate = float(program.gate_scale[unit]) * GRID + float(program.gate_bias[unit])
        total[:, place] += float(program.up_scale[unit]) * silu(gate)
    stays = np.isin(neurons, program.biased)
    own = program.bias[np.isin(program.biased, neurons)].astype(np.float64)
    total[:, stays] += silu(GRID[:, None] + own)
    return float(np.abs(total - clamped(GRID)[:, None]).max())


def gates_and_weights(sample: LayerSample, chosen: Indices) -> tuple[Doubles, Doubles]:
    """Of some neurons ``[tokens, n]``: their gates, and the up projection's squares, which add up to 1 for each."""
    neurons = sample.neurons
    places = neurons.among(chosen)
    gate = neurons.gates(sample.inputs)[:, places].astype(np.float64)
    weight = np.square(neurons.ups(sample.inputs)[:, places], dtype=np.float64)
    return gate, weight / np.maximum(weight.sum(0), np.finfo(np.float64).tiny)


def _solve(gate: Doubles, weight: Doubles, noise: float, scale: Doubles, bias: Doubles) -> Doubles:
    """``[n, units]`` factors of units of one shape for gates ``[tokens, n]``."""
    tail = silu(np.multiply.outer(GRID, scale) + bias)
    terms = silu(gate[..., None] * scale + bias)
    weighted = terms * weight[..., None]
    normal = np.einsum("tnj,tnk->njk", weighted, terms) + (tail * FLOOR[:, None]).T @ tail
    right = np.einsum("tnj,tn->nj", weighted, clamped(gate)) + (tail * FLOOR[:, None]).T @ clamped(GRID)
    ridge = 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None] + noise * np.einsum("tnj,tnj->nj", weighted, terms)
    solved: Doubles = np.linalg.solve(normal + ridge[..., None] * np.eye(len(scale)), right[..., None])[..., 0]
    return solved


def _cost(gate: Doubles, weight: Doubles, noise: float, scale: Doubles, bias: Doubles, alpha: Doubles) -> Doubles:
    """``[n]`` weighted squared errors of units ``[n, units]``, that of rounding their columns included."""
    terms = silu(gate[..., None] * scale + bias) * alpha
    inside = terms.sum(-1) - clamped(gate)
    tail = (silu(GRID[:, None, None] * scale + bias) * alpha).sum(-1) - clamped(GRID)[:, None]
    rounded = noise * (weight[..., None] * terms**2).sum((0, 2))
    cost: Doubles = (weight * inside**2).sum(0) + rounded + (FLOOR[:, None] * tail**2).sum(0)
    return cost


def silu(z: Doubles) -> Doubles:
    """In float64."""
    values: Doubles = z / (1 + np.exp(-np.clip(z, -700, None)))
    return values


def clamped(gate: Doubles) -> Doubles:
    """What a clamp leaves of ``silu(gate)``."""
    left: Doubles = np.minimum(silu(gate), 0)
    return left
