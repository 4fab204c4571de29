"""The compiled rule: a few extra gated neurons ("units") a layer, and neurons switched off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# silu(g - 1000) is exactly -0.0 in float32 for any reachable g, so the neuron contributes nothing.
OFF_BIAS = np.float32(-1000.0)


@dataclass(frozen=True)
class LayerProgram:
    """What is appended to one gated MLP ``y = W_down · (silu(W_gate x + b) ⊙ (W_up x))``.

    Unit ``u`` copies neuron ``i = source[u]``: its gate row is ``gate_scale[u] · W_gate[i]``, its gate bias
    ``gate_bias[u]``, its up row ``up_scale[u] · W_up[i]`` and its down column ``W_down[:, i]``. The neurons in ``off``
    get the gate bias :data:`OFF_BIAS`.

    Attributes:
        source: ``[units]`` int64.
        gate_scale: ``[units]`` float32.
        gate_bias: ``[units]`` float32.
        up_scale: ``[units]`` float32.
        off: ``[n]`` int64, sorted.
    """

    source: Indices
    gate_scale: Floats
    gate_bias: Floats
    up_scale: Floats
    off: Indices

    @property
    def units(self) -> int:
        """Number of extra neurons."""
        return len(self.source)

    def padded(self, units: int) -> LayerProgram:
        """The same program with units that do nothing (zero gate and up rows), ``units`` in all.

        Their down column is a real one, as a column of zeros would widen the range of a quantised block.
        """
        extra = units - self.units
        filler = int(self.source[-1]) if self.units else 0

        def zeros(values: Floats) -> Floats:
            return np.concatenate([values, np.zeros(extra, np.float32)])

        return LayerProgram(
            np.concatenate([self.source, np.full(extra, filler, np.int64)]),
            zeros(self.gate_scale),
            zeros(self.gate_bias),
            zeros(self.up_scale),
            self.off,
        )


@dataclass(frozen=True)
class MLPProgram:
    """One :class:`LayerProgram` a layer, for MLPs of ``width`` neurons."""

    width: int
    layers: tuple[LayerProgram, ...]

    @property
    def widest(self) -> int:
        """Units of the layer that has most."""
        return max(layer.units for layer in self.layers)

    def extra_width(self, multiple: int) -> int:
        """Neurons to append to every layer so that all are equally wide and the addition is a multiple of a block."""
        return -(-self.widest // multiple) * multiple
