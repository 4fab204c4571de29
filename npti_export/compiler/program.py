"""The compiled rule: a few extra gated neurons ("units") a layer, and neurons switched off."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        copies: the last ``copies * len(off)`` units stand for the neurons in ``off``, ``copies`` in a row for each.
        corrects: ``[units]`` int64 or None. Where it is ``v >= 0``, unit ``u`` is unit ``v`` over again but for its
            down column, which is what quantising lost of that of ``v``; elsewhere it is -1.
        silent: whether the new down columns are zero, so that the units are computed and change nothing.
    """

    source: Indices
    gate_scale: Floats
    gate_bias: Floats
    up_scale: Floats
    off: Indices
    copies: int = 1
    corrects: Indices | None = None
    silent: bool = False

    @property
    def units(self) -> int:
        """Number of extra neurons."""
        return len(self.source)

    def padded(self, units: int) -> LayerProgram:
        """The same program with units that do nothing (zero gate and up rows), ``units`` in all.

        Their down column is a real one, as a column of zeros would widen the range of a quantised block.
        """
        extra = units - self.units
        last = max(self.units - 1, 0)
        return self.picked(np.append(np.arange(self.units), np.full(extra, last)), np.arange(units) < self.units)

    def picked(self, units: Indices, works: npt.NDArray[np.bool_]) -> LayerProgram:
        """Units ``units`` of this program in that order, idle where they do not work; any number if it has none."""

        def pick(values: Floats) -> Floats:
            return (values[units] * works if self.units else np.zeros(len(units))).astype(np.float32)

        return replace(
            self,
            source=self.source[units] if self.units else np.zeros(len(units), np.int64),
            gate_scale=pick(self.gate_scale),
            gate_bias=pick(self.gate_bias),
            up_scale=pick(self.up_scale),
            copies=1,
            corrects=None,
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
