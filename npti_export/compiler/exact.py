"""The exact program: one unit a shift, a few units a clamp."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npti_export.compiler.clamp import clamp_basis
from npti_export.compiler.program import LayerProgram, MLPProgram
from npti_export.rule import SteeringRule


def compile_exact(rule: SteeringRule, clamp_units: int) -> MLPProgram:
    """Compile a rule for gated MLPs with SiLU.

    A shift ``c`` of neuron ``i`` is a unit whose gate is the constant ``silu(b) = |c|``: it adds exactly
    ``c · (W_up[i]·x) · W_down[:, i]``. A clamp switches neuron ``i`` off and puts ``clamp_units`` units in its place
    whose gates sum to ``min(silu(g), 0)`` within the error of :func:`clamp_basis`. A constant stays what it is, as
    folding it takes the weights.

    Args:
        rule: what to compile.
        clamp_units: 3, 4 or 5.
    """
    basis = clamp_basis(clamp_units)
    gates = np.zeros(rule.shift.shape)
    gates[rule.shift != 0] = silu_inverse(np.abs(rule.shift[rule.shift != 0]))
    constants = rule.constant if rule.constant is not None else np.zeros_like(rule.shift)
    layers = []
    for shift, clamp, gate, constant in zip(rule.shift, rule.clamp, gates, constants, strict=True):
        shifted = np.flatnonzero(shift)
        off = np.flatnonzero(clamp)
        layers.append(
            LayerProgram(
                source=np.concatenate([shifted, np.repeat(off, clamp_units)]).astype(np.int64),
                gate_scale=_join(np.zeros(len(shifted)), np.tile(basis.scale, len(off))),
                gate_bias=_join(gate[shifted], np.tile(basis.bias, len(off))),
                up_scale=_join(np.sign(shift[shifted]), np.tile(basis.alpha, len(off))),
                off=off.astype(np.int64),
                copies=clamp_units,
                constant=constant if constant.any() else None,
            )
        )
    return MLPProgram(rule.shift.shape[1], tuple(layers))


def silu_inverse(value: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The ``b > 0`` with ``silu(b) = value``, for ``value > 0``, by bisection in float64.

    ``b / 2 < silu(b) < b`` for ``b > 0`` brackets it between ``value`` and ``2 · value``.
    """
    target = np.asarray(value, dtype=np.float64)
    low, high = target.copy(), 2 * target
    for _ in range(60):
        middle = (low + high) / 2
        below = middle / (1 + np.exp(-middle)) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _join(*parts: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return np.concatenate(parts).astype(np.float32)
