"""Pass: the best program of one layer that fits into a number of extra neurons."""

from __future__ import annotations

from collections.abc import Iterator

from npti_export.compiler.gate_bias import all_to_biases, clamps_to_biases
from npti_export.compiler.low_rank import low_rank
from npti_export.compiler.neurons import LayerRule, LayerSample, relative_error
from npti_export.compiler.program import LayerProgram


def within_budget(rule: LayerRule, exact: LayerProgram, sample: LayerSample, units: int) -> LayerProgram:
    """The candidate of at most ``units`` units with the least error on the calibration tokens.

    Args:
        rule: what to approximate.
        exact: the rule written out, which is best where there is room for it.
        sample: calibration tokens.
        units: extra neurons that the layer may have.
    """
    if exact.units <= units or not len(rule.touched):
        return exact
    return min(_candidates(rule, exact, sample, units), key=lambda one: relative_error(rule, one, sample))


def _candidates(rule: LayerRule, exact: LayerProgram, sample: LayerSample, units: int) -> Iterator[LayerProgram]:
    """Clamps are biases in all of them; shifts are copies, ranks of a linear map, or biases."""
    clamps = clamps_to_biases(rule, exact, sample)
    if clamps.units <= units:
        yield low_rank(rule, clamps, sample, units - clamps.units)
    else:
        yield low_rank(rule, without_units(clamps), sample, units, known=True)
    yield low_rank(rule, all_to_biases(rule, exact, sample), sample, units)


def without_units(program: LayerProgram) -> LayerProgram:
    """The program's biases alone."""
    nothing = program.source[:0]
    return program.picked(nothing, nothing.astype(bool))
