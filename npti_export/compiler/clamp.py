"""A clamp as a sum of SiLUs: ``min(silu(g), 0) ≈ Σ alpha_j silu(scale_j g + bias_j)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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


class Gates(NamedTuple):
    """Where ``n`` clamps are to be right, and how much it matters.

    Attributes:
        gate: ``[n, points]``: those that each neuron had on calibration tokens, then :data:`GRID`.
        weight: likewise, of the squared error: the up projection's squares, which add up to 1, then :data:`FLOOR`.
        tokens: how many points are of tokens.
        size: ``[n]``: times a squared error, that in the layer's output, summed over tokens.
    """

    gate: Doubles
    weight: Doubles
    tokens: int
    size: Doubles


class Clamps(NamedTuple):
    """Units of ``n`` clamps, ``sum_j alpha_j silu(scale_j g + bias_j)``, beside the neurons' own ``silu(g + own)``.

    Attributes:
        own: ``[n]``, minus infinity where the neuron is switched off.
        scale: ``[n, units]``.
        bias: likewise.
        alpha: likewise.
    """

    own: Doubles
    scale: Doubles
    bias: Doubles
    alpha: Doubles


def fit_clamps(
    rule: LayerRule, program: LayerProgram, sample: LayerSample, *, rounding: float = 0.0, units: int = 0
) -> LayerProgram:
    """Pass: each clamp's units fitted to the gates that its neuron had, weighted by the up projection's squares.

    Of the shapes with as many units the best is taken for each neuron, its factors being the solution of a weighted
    least-squares problem; a small weight on all other gates bounds the error there. Terms that cancel are large beside
    their sum, and each is rounded with its own column, so their squares count as well, times that of ``rounding``.

    Args:
        rule: of the layer.
        program: with clamps written out.
        sample: calibration tokens.
        rounding: relative error of a column in the file's type, 0 for floats.
        units: of a clamp; 0 for as many as the program has.
    """
    del rule  # the program says which neurons are clamped
    if not len(program.off):
        return program
    found, _ = fitted_clamps(gates_of(sample, program.off), units or program.copies, rounding)
    return with_clamps(program, found)


def fitted_clamps(gates: Gates, units: int, rounding: float) -> tuple[Clamps, Doubles]:
    """The best units for each neuron, which is switched off itself, and what they cost, ``[n]``."""
    basis, count = clamp_basis(units), len(gates.gate)
    tiled = (np.tile(values, (count, 1)) for values in (basis.scale, basis.bias, basis.alpha))
    best = Clamps(np.full(count, -np.inf), *tiled)
    terms = silu(gates.gate[..., None] * basis.scale + basis.bias)
    left = clamped(gates.gate)
    lowest = _cost(gates, terms, best.alpha, left, rounding**2)
    for scale, bias in SHAPES[units]:
        shape = Clamps(best.own, *_tiled(count, scale, bias))
        keep_better(best, lowest, *solved(gates, shape, left, _LARGEST, rounding**2))
    return best, lowest


def keep_better(best: Clamps, lowest: Doubles, found: Clamps, cost: Doubles) -> None:
    """Put what costs less where it costs less, in place."""
    better = cost < lowest
    lowest[better] = cost[better]
    for old, new in zip(best, found, strict=True):
        old[better] = new[better]


def solved(gates: Gates, shape: Clamps, left: Doubles, largest: float, noise: float = 0.0) -> tuple[Clamps, Doubles]:
    """Units with the factors, up to ``largest``, that fit ``left``, ``[n, points]``, and what they cost, ``[n]``."""
    terms = silu(gates.gate[..., None] * shape.scale[:, None] + shape.bias[:, None])
    weighted = terms * gates.weight[..., None]
    normal = np.einsum("npj,npk->njk", weighted, terms)
    rounded = noise * np.einsum("npj,npj->nj", weighted[:, : gates.tokens], terms[:, : gates.tokens])
    ridge = 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None] + rounded
    right = np.einsum("npj,np->nj", weighted, left)
    alpha = np.linalg.solve(normal + ridge[..., None] * np.eye(terms.shape[-1]), right[..., None])[..., 0]
    alpha = np.clip(alpha, -largest, largest)
    return shape._replace(alpha=alpha), _cost(gates, terms, alpha, left, noise)


def with_clamps(program: LayerProgram, found: Clamps) -> LayerProgram:
    """The program with other units for its clamps; a neuron that stays gets its bias instead of being switched off."""
    first = program.copied - program.copies * len(program.off)
    kept = program.picked(np.arange(first), np.ones(first, np.bool_))
    units, stays = found.scale.shape[1], bool(np.isfinite(found.own).all())

    def more(old: npt.NDArray[np.float32], new: Doubles) -> npt.NDArray[np.float32]:
        return np.concatenate([old, new.ravel()]).astype(np.float32)

    return replace(
        kept,
        source=np.concatenate([kept.source, np.repeat(program.off, units)]),
        gate_scale=more(kept.gate_scale, found.scale),
        gate_bias=more(kept.gate_bias, found.bias),
        up_scale=more(kept.up_scale, found.alpha),
        off=program.off[:0] if stays else program.off,
        copies=0 if stays else units,
        biased=program.off if stays else program.biased,
        bias=found.own.astype(np.float32) if stays else program.bias,
    )


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


def gates_of(sample: LayerSample, chosen: Indices) -> Gates:
    """Of some neurons of a layer, what fits need."""
    neurons, count = sample.neurons, len(chosen)
    places = neurons.among(chosen)
    gate = neurons.gates(sample.inputs)[:, places].T.astype(np.float64)
    weight = np.square(neurons.ups(sample.inputs)[:, places].T, dtype=np.float64)
    total = np.maximum(weight.sum(1), np.finfo(np.float64).tiny)
    return Gates(
        np.concatenate([gate, np.tile(GRID, (count, 1))], axis=1),
        np.concatenate([weight / total[:, None], np.tile(FLOOR, (count, 1))], axis=1),
        gate.shape[1],
        total * np.square(neurons.down[:, places], dtype=np.float64).sum(0),
    )


def _cost(gates: Gates, terms: Doubles, alpha: Doubles, left: Doubles, noise: float) -> Doubles:
    """``[n]`` weighted squared errors of terms ``[n, points, units]``, that of rounding their columns included."""
    parts = terms * alpha[:, None]
    rounded = np.square(parts[:, : gates.tokens]).sum(-1) * gates.weight[:, : gates.tokens]
    cost: Doubles = (gates.weight * np.square(parts.sum(-1) - left)).sum(1) + noise * rounded.sum(1)
    return cost


def _tiled(count: int, scale: Sequence[float], bias: Sequence[float]) -> tuple[Doubles, Doubles, Doubles]:
    """A shape, ``count`` times over, with factors that are not known yet."""
    return np.tile(scale, (count, 1)), np.tile(bias, (count, 1)), np.zeros((count, len(scale)))


def silu(z: Doubles) -> Doubles:
    """In float64."""
    values: Doubles = z / (1 + np.exp(-np.clip(z, -700, None)))
    return values


def clamped(gate: Doubles) -> Doubles:
    """What a clamp leaves of ``silu(gate)``."""
    left: Doubles = np.minimum(silu(gate), 0)
    return left
