"""Pass: how many units a clamp gets, layer by layer: more where the error that they spare is large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from npti_export.activations import activate
from npti_export.compiler.clamp import fit_clamps
from npti_export.compiler.neurons import LayerRule, LayerSample, remainder
from npti_export.compiler.program import LayerProgram, MLPProgram
from npti_export.compiler.refine import refine_clamps
from npti_export.compiler.shapes import SHAPES, STAYING
from npti_export.errors import CompileError

_WORTH = 0.9  # a unit more must bring a layer's error down to this, or it is not spent


class ClampCosts(NamedTuple):
    """A layer's clamps.

    Attributes:
        clamps: how many.
        errors: by units of each, what they are off by, squared, times :attr:`LayerSample.sensitivity`.
    """

    clamps: int
    errors: dict[int, float]


def fit_shared(
    rules: Sequence[LayerRule], program: MLPProgram, samples: Sequence[LayerSample], *, average: float, rounding: float
) -> MLPProgram:
    """The program with every clamp fitted to its gates, by as many units as its layer gets.

    What a layer's clamps are off by is seen in relation to the residual stream, which grows from layer to layer: so
    a clamp in an early layer matters more. Units are shared so that the sum of these errors, squared, is least. In
    quantised types rounding is a part of the error, which more units do not mend: what is not worth one is not spent.

    Args:
        rules: one a layer.
        program: the rule written out.
        samples: calibration tokens, one a layer.
        average: units for a clamp beside the neuron itself, over the model.
        rounding: relative error of a column in the file's type; 0 for floats, where the neuron stays as one more unit.

    Raises:
        CompileError: ``average`` is less than a clamp takes in this type.
    """
    choices = sorted(SHAPES if rounding else STAYING)
    if average < choices[0]:
        raise CompileError(
            f"compile.clamp_units = {average:g}: in this file's type a clamp takes at least {choices[0]} extra neurons"
        )
    parts = list(zip(rules, program.layers, samples, strict=True))
    fits = [_fits(*part, choices, rounding) for part in parts]
    layers = [_costs(part, one, rounding) for part, one in zip(parts, fits, strict=True)]
    # never wider than if all had as many, as most files are as wide everywhere as their widest layer
    shifts = [len(np.flatnonzero(rule.shift)) for rule in rules]
    widest = max(count + math.ceil(average) * layer.clamps for count, layer in zip(shifts, layers, strict=True))
    units = share(layers, [widest - count for count in shifts], average)
    chosen = [one.get(count, layer) for one, count, layer in zip(fits, units, program.layers, strict=True)]
    if not rounding:
        chosen = [refine_clamps(*part, units=count) for part, count in zip(parts, units, strict=True)]
    return MLPProgram(program.width, tuple(chosen))


def share(layers: Sequence[ClampCosts], room: Sequence[int], average: float) -> list[int]:
    """Units of a clamp for each layer, 0 where there is none: the least sum of errors, by dynamic programming.

    Args:
        layers: what they cost.
        room: most units that all clamps of a layer may take together; the fewest that a clamp needs always fit.
        average: units of a clamp over all layers. A layer gets no fewer than its whole part, unless fewer do the same.
    """
    budget = int(average * sum(layer.clamps for layer in layers))
    least, picks = np.zeros(budget + 1), []  # by units spent on the layers so far
    choices = [_choices(*parts, int(average)) for parts in zip(layers, room, strict=True)]
    for layer, some in zip(layers, choices, strict=True):
        tried = np.full((len(some), budget + 1), np.inf)
        for row, units in zip(tried, some, strict=True):
            row[layer.clamps * units :] = least[: budget + 1 - layer.clamps * units] + layer.errors.get(units, 0)
        least = tried.min(0)
        picks.append(tried.argmin(0))
    found, left = [], budget
    for layer, some, pick in zip(reversed(layers), reversed(choices), reversed(picks), strict=True):
        found.append(some[pick[left]])
        left -= layer.clamps * found[-1]
    return found[::-1]


def _choices(layer: ClampCosts, room: int, start: int) -> list[int]:
    """``start`` units of a clamp, or as many fewer as do the same, and all larger numbers that are worth it."""
    if not layer.clamps:
        return [0]
    units, errors = min(max(start, min(layer.errors)), max(layer.errors)), layer.errors
    while units - 1 in errors and errors[units] > _WORTH * errors[units - 1]:
        units -= 1
    some = [units]
    for more in range(units + 1, max(errors) + 1):
        if layer.clamps * more <= room and errors[more] < _WORTH * errors[some[-1]]:
            some.append(more)
    return some


def _fits(
    rule: LayerRule, program: LayerProgram, sample: LayerSample, choices: Sequence[int], rounding: float
) -> dict[int, LayerProgram]:
    """The layer with so many units a clamp, unrefined (they rank alike); none without clamps."""
    fit = partial(fit_clamps, rounding=rounding) if rounding else partial(refine_clamps, rounds=0)
    return {units: fit(rule, program, sample, units=units) for units in choices if len(program.off)}


def _costs(
    part: tuple[LayerRule, LayerProgram, LayerSample], fits: dict[int, LayerProgram], rounding: float
) -> ClampCosts:
    rule, program, sample = part
    errors = {
        units: (float(np.square(remainder(rule, one, sample), dtype=np.float64).sum()) + rounded(one, sample, rounding))
        * sample.sensitivity
        for units, one in fits.items()
    }
    return ClampCosts(len(program.off), errors)


def rounded(program: LayerProgram, sample: LayerSample, rounding: float) -> float:
    """What rounding every unit's column by itself changes, squared and summed over tokens, expected."""
    if not rounding:
        return 0.0
    neurons, x = sample.neurons, sample.inputs
    at = neurons.among(program.source)
    units = activate(program.gate_scale * neurons.gates(x)[:, at] + program.gate_bias, "silu")
    sizes = np.square(units * program.up_scale * neurons.ups(x)[:, at], dtype=np.float64).sum(0)
    return float(rounding**2 * sizes @ np.square(neurons.down[:, at], dtype=np.float64).sum(0))
