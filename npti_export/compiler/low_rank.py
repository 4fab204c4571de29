"""Pass: what a program leaves of the rule, as a linear map of low rank and a constant.

A unit with a constant gate is one rank of a linear map of the MLP's input. A sum of shifts is such a map exactly, so
its best approximation of a rank needs no more units than there are shifts, and mostly far fewer. The nonlinear rest
(what biases get wrong of clamps) is regressed on the input with a ridge. Ranks are cut by reduced-rank regression: the
directions of the output that vary most over the calibration tokens are kept (Izenman 1975).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from npti_export.compiler.exact import silu_inverse
from npti_export.compiler.neurons import Floats, LayerRule, LayerSample, remainder
from npti_export.compiler.program import DenseUnits, LayerProgram

Doubles = npt.NDArray[np.float64]
_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the mean variance of an input
_HELD_OUT = 5  # every fifth token chooses the ridge


def low_rank(
    rule: LayerRule, program: LayerProgram, sample: LayerSample, rank: int, *, known: bool = False
) -> LayerProgram:
    """The program with up to ``rank`` dense units more, and the mean of what is left as a down bias.

    Args:
        rule: what to approximate.
        program: what there is already; it has no dense units.
        sample: calibration tokens.
        rank: how many units may be added.
        known: whether all shifts of the rule are still to be made, which is a known linear map.
    """
    x = sample.inputs.astype(np.float64)
    x -= x.mean(0)
    left = remainder(rule, program, sample).astype(np.float64)
    left -= left.mean(0)
    shifts = _shift_map(rule, sample) if known else None
    rest = left if shifts is None else left - _apply(shifts, x)
    dual = _ridge(x, rest)  # the regression is x -> (x · x'ᵀ) · dual
    fitted = x @ (x.T @ dual)
    if shifts is not None:
        fitted += _apply(shifts, x)
    out = _directions(fitted, rank)  # [hidden, rank], orthonormal
    up = out.T @ (dual.T @ x) if shifts is None else out.T @ (dual.T @ x) + (out.T @ shifts[0]) @ shifts[1]
    added = replace(program, dense=_balanced(up, out, sample) if out.shape[1] else None)
    return with_mean(rule, added, sample)


def with_mean(rule: LayerRule, program: LayerProgram, sample: LayerSample) -> LayerProgram:
    """The program with the mean of what it leaves of the rule in its down bias: it costs nothing per token."""
    mean = remainder(rule, program, sample).mean(0, dtype=np.float64)
    before = 0 if program.down_bias is None else program.down_bias
    return replace(program, down_bias=(before + mean).astype(np.float32))


def _shift_map(rule: LayerRule, sample: LayerSample) -> tuple[Doubles, Doubles]:
    """All shifts as ``left @ right``, ``[hidden, n]`` and ``[n, hidden]``."""
    neurons = sample.neurons
    shift = rule.shift[neurons.index].astype(np.float64)
    chosen = np.flatnonzero(shift)
    return neurons.down[:, chosen] * shift[chosen], neurons.up[chosen].astype(np.float64)


def _apply(parts: tuple[Doubles, Doubles], x: Doubles) -> Doubles:
    applied: Doubles = (x @ parts[1].T) @ parts[0].T
    return applied


def _ridge(x: Doubles, y: Doubles) -> Doubles:
    """``[tokens, hidden]``, the dual coefficients of a ridge regression whose ridge is best on held-out tokens."""
    tokens, hidden = x.shape
    gram = x @ x.T
    unit = float(np.trace(gram)) / hidden  # tokens times the mean variance of an input
    out = np.arange(tokens) % _HELD_OUT == 0
    inside = gram[np.ix_(~out, ~out)]
    values, vectors = np.linalg.eigh(inside)
    turned, across = vectors.T @ y[~out], gram[np.ix_(out, ~out)] @ vectors
    share = float(np.mean(~out))
    errors = []
    for ridge in _RIDGES:
        predicted = across @ (turned / (values + ridge * unit * share)[:, None])
        errors.append(float(np.square(y[out] - predicted).sum()))
    if min(errors) >= float(np.square(y[out]).sum()):  # nothing linear in it
        return np.zeros_like(y)
    best = _RIDGES[int(np.argmin(errors))]
    dual: Doubles = np.linalg.solve(gram + best * unit * np.eye(tokens), y)
    return dual


def _directions(fitted: Doubles, rank: int) -> Doubles:
    """The ``rank`` directions of the output in which the fitted values vary most, as far as they vary at all."""
    hidden = fitted.shape[1]
    rank = min(rank, *fitted.shape)
    if not rank or not fitted.any():
        return np.zeros((hidden, 0))
    _, sizes, right = np.linalg.svd(fitted, full_matrices=False)
    useful = int((sizes[:rank] > 1e-6 * sizes[0]).sum())
    directions: Doubles = right[:useful].T
    # The sign of a singular vector is the library's whim; the same inputs must give the same file.
    largest = directions[np.abs(directions).argmax(0), np.arange(useful)]
    return directions * np.sign(largest)


def _balanced(up: Doubles, down: Doubles, sample: LayerSample) -> DenseUnits:
    """Rows and columns of the size that the model's own have, which its types round best; the gates hold the rest."""
    neurons = sample.neurons
    rows, columns = (
        float(np.sqrt(np.square(one).mean(dtype=np.float64))) or 1.0 for one in (neurons.up, neurons.down)
    )
    sizes = [np.sqrt(np.square(one).mean(axis)) for one, axis in ((up, 1), (down, 0))]
    sizes = [np.where(size > 0, size, 1.0) for size in sizes]
    strength = sizes[0] * sizes[1] / (rows * columns)
    return DenseUnits(
        silu_inverse(strength).astype(np.float32),
        (up / sizes[0][:, None] * rows).astype(np.float32),
        (down / sizes[1] * columns).astype(np.float32),
    )
