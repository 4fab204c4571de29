"""What a rule or a program changes in one MLP, computed from the weights of the neurons that it touches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npti_export.activations import activate
from npti_export.compiler.program import LayerProgram

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neurons:
    """Weights of ``n`` neurons of one gated MLP, float32.

    Attributes:
        index: ``[n]`` int64, sorted: their places in the MLP.
        gate: ``[n, hidden]``.
        up: ``[n, hidden]``.
        down: ``[hidden, n]``.
        gate_bias: ``[n]``, zeros where the model has none.
        up_bias: ``[n]``, likewise.
    """

    index: Indices
    gate: Floats
    up: Floats
    down: Floats
    gate_bias: Floats
    up_bias: Floats

    def among(self, neurons: Indices) -> Indices:
        """Where these neurons of the MLP are among the ``n``; all of them must be."""
        places = np.searchsorted(self.index, neurons)
        assert np.array_equal(self.index[np.minimum(places, len(self.index) - 1)], neurons) or not len(neurons)
        return places

    def gates(self, x: Floats) -> Floats:
        """Pre-activations ``[tokens, n]`` of inputs ``x`` ``[tokens, hidden]``."""
        values: Floats = x @ self.gate.T + self.gate_bias
        return values

    def ups(self, x: Floats) -> Floats:
        """The up projection ``[tokens, n]``."""
        values: Floats = x @ self.up.T + self.up_bias
        return values


@dataclass(frozen=True)
class LayerSample:
    """One layer on calibration tokens.

    Attributes:
        inputs: ``[tokens, hidden]`` float32, what the MLP reads while the model is steered.
        neurons: those that the rule touches.
        sensitivity: what an error of square 1 in the MLP's output weighs beside one in another layer. Norms divide the
            residual stream by its size, so the mean of the inverse of its square; measured on every layer of a model by
            itself, KL divergences go with that (within a factor of two), not with errors by size of the MLP's output.
    """

    inputs: Floats
    neurons: Neurons
    sensitivity: float = 1.0


@dataclass(frozen=True)
class LayerRule:
    """One layer of a :class:`npti_export.rule.SteeringRule`: ``[width]`` each; None for no constant."""

    shift: Floats
    clamp: npt.NDArray[np.bool_]
    constant: Floats | None = None

    @property
    def touched(self) -> Indices:
        """Sorted neurons that anything happens to."""
        touched = self.clamp | (self.shift != 0)
        if self.constant is not None:
            touched = touched | (self.constant != 0)
        return np.flatnonzero(touched)


def rule_change(rule: LayerRule, sample: LayerSample) -> Floats:
    """What the rule adds to the MLP's output, ``[tokens, hidden]`` (paper, neuron-based induction)."""
    neurons, x = sample.neurons, sample.inputs
    a = activate(neurons.gates(x), "silu")
    steered = np.where(rule.clamp[neurons.index], np.minimum(a, 0), a) + rule.shift[neurons.index]
    product: Floats = (steered - a) * neurons.ups(x)
    if rule.constant is not None:
        product += rule.constant[neurons.index]
    changed: Floats = product @ neurons.down.T
    return changed


def program_change(program: LayerProgram, sample: LayerSample) -> Floats:
    """What a program adds to the MLP's output, ``[tokens, hidden]``, in float32; corrections do nothing here."""
    neurons, x = sample.neurons, sample.inputs
    gate, up = neurons.gates(x), neurons.ups(x)
    product = np.zeros_like(gate)
    off, biased = neurons.among(program.off), neurons.among(program.biased)
    product[:, off] -= activate(gate[:, off], "silu")
    before = activate(gate[:, biased], "silu")
    product[:, biased] += activate(gate[:, biased] + program.bias, "silu") - before
    product *= up
    source = neurons.among(program.source)
    units = activate(program.gate_scale * gate[:, source] + program.gate_bias, "silu")
    np.add.at(product.T, source, (units * (program.up_scale * up[:, source])).T)
    if program.constant is not None:
        product += program.constant[neurons.index]
    change: Floats = product @ neurons.down.T
    if program.dense is not None:
        dense = program.dense
        change += (activate(dense.gate_bias, "silu") * (x @ dense.up.T)) @ dense.down.T
    if program.down_bias is not None:
        change += program.down_bias
    return change


def remainder(rule: LayerRule, program: LayerProgram, sample: LayerSample) -> Floats:
    """What the rule does and the program does not, ``[tokens, hidden]``."""
    left: Floats = rule_change(rule, sample) - program_change(program, sample)
    return left


def relative_error(rule: LayerRule, program: LayerProgram, sample: LayerSample) -> float:
    """Root mean square of :func:`remainder` over that of the rule's change; 0 where the rule changes nothing."""
    wanted = float(np.square(rule_change(rule, sample), dtype=np.float64).sum())
    left = float(np.square(remainder(rule, program, sample), dtype=np.float64).sum())
    return float(np.sqrt(left / wanted)) if wanted else 0.0
