"""The compiler: rule → program, by passes in a visible list, each pure and in a file of its own.

A pass takes the layers' rules, the program so far and the layers' calibration tokens, and returns a new program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from npti_export.compiler.budget import within_budget, without_units
from npti_export.compiler.canonical import canonical
from npti_export.compiler.clamp import worst_clamp
from npti_export.compiler.exact import compile_exact
from npti_export.compiler.gate_bias import all_to_biases, clamps_to_biases
from npti_export.compiler.kinds import ProgramKind
from npti_export.compiler.low_rank import low_rank, with_mean
from npti_export.compiler.neurons import LayerRule, LayerSample, relative_error
from npti_export.compiler.program import LayerProgram, MLPProgram
from npti_export.compiler.share import fit_shared
from npti_export.errors import CompileError
from npti_export.rule import SteeringRule

LayerPass = Callable[[LayerRule, LayerProgram, LayerSample], LayerProgram]
ProgramPass = Callable[[Sequence[LayerRule], MLPProgram, Sequence[LayerSample]], MLPProgram]
Measure = Callable[[MLPProgram], float]


@dataclass(frozen=True)
class Pass:
    """A step of the compiler, with the name that ``--explain`` shows."""

    name: str
    run: ProgramPass


@dataclass(frozen=True)
class Step:
    """What a pass made of the program.

    Attributes:
        name: of the pass.
        units: mean extra neurons a layer.
        widest: of the layer that has most.
        biases: layers with a bias that is not of an extra neuron, at gate or output.
        worst: largest error of a clamp that is written out, at any gate up to 60 in size; 0 where none is.
        error: predicted: what the rule changes and the program does not, by what the rule changes, root mean square
            over the layers that the rule touches.
    """

    name: str
    units: float
    widest: int
    biases: int
    worst: float
    error: float


@dataclass(frozen=True)
class Compiled:
    """A program and how it came about."""

    program: MLPProgram
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Calibration:
    """What the compiler knows of the model beside the rule.

    Attributes:
        samples: one a layer.
        width: neurons of the model's layers.
        block: extra neurons come in multiples of it.
        rounding: relative error of a column of the down projections in their type; 0 for floats, where a column and
            its copy are equal to the bit.
    """

    samples: Sequence[LayerSample]
    width: int
    block: int
    rounding: float


def passes_for(kind: ProgramKind, units: int, clamp_units: float, rounding: float) -> tuple[Pass, ...]:
    """What follows the rule written out.

    Args:
        kind: of program.
        units: extra neurons that a layer may have.
        clamp_units: extra neurons for one clamp, on average.
        rounding: see :class:`Calibration`.
    """
    fit = Pass("clamps fitted to their gates", partial(fit_shared, average=clamp_units, rounding=rounding))
    if kind.name == "exact":
        return (fit,)
    if kind.name == "bias":
        return (Pass("units to gate biases", _each(all_to_biases)), Pass("mean to an output bias", _each(_mean)))
    if kind.name == "lowrank":
        rank = partial(_low_rank, rank=int(kind.value))
        return (
            Pass("clamps to gate biases", _each(clamps_to_biases)),
            Pass(f"rest to rank {kind.value:g}", _each(rank)),
        )
    return (fit, Pass(f"best within {units} units", _each(partial(_within, units=units))))


def compile_rule(
    rule: SteeringRule,
    kind: ProgramKind,
    calibration: Calibration,
    clamp_units: float,
    measure: Measure | None = None,
) -> Compiled:
    """Compile a rule.

    Args:
        rule: what the program should do.
        kind: exactly, or for what price.
        calibration: of the model; as many layers as the rule.
        clamp_units: extra neurons for one clamp, on average over the layers, where it is written out.
        measure: KL(rule ‖ program) in nats, needed for ``kl``.

    Raises:
        CompileError: no program keeps the KL that was asked for.
    """
    rule = canonical(rule)
    if kind.name != "kl":
        return _compiled(rule, kind, calibration, clamp_units, budget_units(kind, calibration.width, calibration.block))
    assert measure is not None
    exact = _compiled(rule, ProgramKind("exact"), calibration, clamp_units, 0)
    least, most = 0, -(-exact.program.widest // calibration.block)
    reached = measure(exact.program)
    if reached > kind.value:
        raise CompileError(
            f"program {kind}: the rule written out in full ({exact.program.widest} units in its widest layer) is at "
            f"KL {reached:.2g}; ask for more than that, or take an F32 base"
        )
    best = exact
    while least < most:
        middle = (least + most) // 2
        found = _compiled(rule, kind, calibration, clamp_units, middle * calibration.block)
        if measure(found.program) <= kind.value:
            best, most = found, middle
        else:
            least = middle + 1
    return best


def budget_units(kind: ProgramKind, width: int, block: int) -> int:
    """Extra neurons that a budget allows, whole blocks of the model's types; 0 for other programs.

    Args:
        kind: of program.
        width: see :class:`Calibration`.
        block: likewise.

    Raises:
        CompileError: not even one block fits.
    """
    if kind.name != "budget":
        return 0
    units = int(kind.value / 100 * width) // block * block
    if not units:
        least = 100 * block / width
        raise CompileError(
            f"program {kind}: neurons come in blocks of {block} in this file, which is {least:.2g}% of its "
            f"{width}; take budget:{np.ceil(10 * least) / 10:g}% or bias, which adds none"
        )
    return units


def _compiled(
    rule: SteeringRule, kind: ProgramKind, calibration: Calibration, clamp_units: float, units: int
) -> Compiled:
    rules = layer_rules(rule)
    program = compile_exact(rule, max(3, math.ceil(clamp_units)))
    steps = [_step("rule written out", rules, program, calibration)]
    for one in passes_for(kind, units, clamp_units, calibration.rounding):
        program = one.run(rules, program, calibration.samples)
        steps.append(_step(one.name, rules, program, calibration))
    return Compiled(program, tuple(steps))


def compile_constant(rule: SteeringRule) -> Compiled | None:
    """The program of a rule that only adds constants, which is exact and needs no calibration; None for others."""
    rule = canonical(rule)
    if rule.shifted or rule.clamped or rule.constant is None:
        return None
    biases = int(rule.constant.any(axis=1).sum())
    return Compiled(compile_exact(rule, 3), (Step("rule written out", 0.0, 0, biases, 0.0, 0.0),))


def layer_rules(rule: SteeringRule) -> list[LayerRule]:
    """One a layer."""
    constants = [None] * len(rule.shift) if rule.constant is None else list(rule.constant)
    return [LayerRule(*parts) for parts in zip(rule.shift, rule.clamp, constants, strict=True)]


def _step(name: str, rules: Sequence[LayerRule], program: MLPProgram, calibration: Calibration) -> Step:
    parts = list(zip(rules, program.layers, calibration.samples, strict=True))
    errors = [relative_error(*one) for one in parts if len(one[0].touched)]
    return Step(
        name,
        float(np.mean([layer.units for layer in program.layers])),
        program.widest,
        sum(layer.changes_output or bool(len(layer.biased) + len(layer.off)) for layer in program.layers),
        max((worst_clamp(layer) for layer in program.layers), default=0.0),
        float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0,
    )


def _each(run: LayerPass) -> ProgramPass:
    """A pass over each layer by itself."""

    def all_layers(rules: Sequence[LayerRule], program: MLPProgram, samples: Sequence[LayerSample]) -> MLPProgram:
        layers = (run(*parts) for parts in zip(rules, program.layers, samples, strict=True))
        return MLPProgram(program.width, tuple(layers))

    return all_layers


def _mean(rule: LayerRule, program: LayerProgram, sample: LayerSample) -> LayerProgram:
    return with_mean(rule, program, sample) if len(rule.touched) else program


def _low_rank(rule: LayerRule, program: LayerProgram, sample: LayerSample, rank: int) -> LayerProgram:
    if not len(rule.touched):
        return program
    return low_rank(rule, without_units(program), sample, rank, known=True)


def _within(rule: LayerRule, program: LayerProgram, sample: LayerSample, units: int) -> LayerProgram:
    return within_budget(rule, program, sample, units)
