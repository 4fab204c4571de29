"""Pass: a neuron's own gate bias in place of extra neurons.

``silu(g + b)`` with ``b`` well below 0 is nearly what a clamp leaves of ``silu(g)``, and with ``b`` above 0 nearly
``silu(g) + c``. It costs nothing per token and changes no weight. What the bias gets wrong on average over tokens goes
into the down projection's bias, so a bias is judged by the variance that it leaves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from npti_export.activations import activate
from npti_export.compiler.neurons import Floats, Indices, LayerRule, LayerSample
from npti_export.compiler.program import OFF_BIAS, LayerProgram

# Of gates of size one: beyond 8 below, a neuron does nothing; beyond 6 above, silu is linear.
_CANDIDATES = np.concatenate([[OFF_BIAS], np.arange(-8, -2, 0.25), np.arange(-2, 2, 0.1), np.arange(2, 6.1, 0.25)])
_USELESS = 0.98  # a bias that leaves more of the variance than this is not worth a number in the file


class Fit(NamedTuple):
    """The best bias of each of some neurons.

    Attributes:
        bias: ``[n]`` float32, :data:`OFF_BIAS` where switching the neuron off is best, 0 where no bias helps.
        left: ``[n]`` float64, the share of the variance of what the rule changes that it leaves.
    """

    bias: Floats
    left: Floats


def fit_biases(rule: LayerRule, sample: LayerSample, chosen: Indices) -> Fit:
    """For each chosen neuron by itself the bias under which ``(silu(g + b) - steered a) · up`` varies least."""
    neurons = sample.neurons
    places = neurons.among(chosen)
    gate = neurons.gates(sample.inputs)[:, places]
    up = neurons.ups(sample.inputs)[:, places]
    plain = activate(gate, "silu")
    steered = np.where(rule.clamp[chosen], np.minimum(plain, 0), plain) + rule.shift[chosen]
    before = ((steered - plain) * up).var(0, dtype=np.float64)
    bias, best = np.zeros(len(chosen), np.float32), before.copy()
    for candidate in _CANDIDATES.astype(np.float32):
        left = ((steered - activate(gate + candidate, "silu")) * up).var(0, dtype=np.float64)
        better = left < best
        bias[better], best[better] = candidate, left[better]
    share = np.divide(best, before, out=np.ones_like(best), where=before > 0)
    return Fit(np.where(share < _USELESS, bias, np.float32(0)), np.where(share < _USELESS, share, 1.0))


def clamps_to_biases(rule: LayerRule, program: LayerProgram, sample: LayerSample) -> LayerProgram:
    """The program with every clamp's units gone: the neuron's gate biased, or switched off."""
    first = program.copied - program.copies * len(program.off)
    kept = np.arange(first)
    only = program.picked(kept, np.ones(first, np.bool_))
    return _with_biases(only, np.flatnonzero(rule.clamp), fit_biases(rule, sample, np.flatnonzero(rule.clamp)))


def all_to_biases(rule: LayerRule, program: LayerProgram, sample: LayerSample) -> LayerProgram:
    """The program with no unit at all: shifts and clamps alike as biases."""
    none = program.picked(np.zeros(0, np.int64), np.zeros(0, np.bool_))
    touched = np.flatnonzero(rule.clamp | (rule.shift != 0))
    return _with_biases(none, touched, fit_biases(rule, sample, touched))


def _with_biases(program: LayerProgram, neurons: Indices, fit: Fit) -> LayerProgram:
    off = fit.bias == OFF_BIAS
    biased = ~off & (fit.bias != 0)
    return replace(program, off=neurons[off], biased=neurons[biased], bias=fit.bias[biased], copies=0, corrects=None)
