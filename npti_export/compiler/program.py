"""The compiled rule: a few extra gated neurons ("units") a layer, neurons switched off, and biases."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from npti_export.errors import ProfileError

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# silu(g - 1000) is exactly -0.0 in float32 for any reachable g, so the neuron contributes nothing.
OFF_BIAS = np.float32(-1000.0)


@dataclass(frozen=True)
class DenseUnits:
    """Units that copy no neuron: unit ``r`` adds ``silu(gate_bias[r]) · (up[r]·x) · down[:, r]``.

    Their gate rows are zero. Any linear map of the MLP's input is such a sum. A quantised file rounds columns of like
    size best, as 32 or more neighbours share a scale, so a unit's strength belongs into its gate bias (method.md, 3).

    Attributes:
        gate_bias: ``[R]`` float32.
        up: ``[R, hidden]`` float32.
        down: ``[hidden, R]`` float32.

    Raises:
        ProfileError: sizes that do not go together, or a value that is not finite.
    """

    gate_bias: Floats
    up: Floats
    down: Floats

    def __post_init__(self) -> None:
        rows = self.up.shape
        if len(rows) != 2 or self.down.shape != rows[::-1] or self.gate_bias.shape != rows[:1]:
            raise ProfileError(f"dense units: up {rows} and down {self.down.shape} do not go together; compile again")
        _refuse_infinite("a dense unit", self.gate_bias, self.up, self.down)

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.gate_bias)

    def picked(self, units: Indices, works: npt.NDArray[np.bool_]) -> DenseUnits:
        """Units ``units`` in that order, idle (a zero up row and gate bias, the column kept) where they do not work."""
        up = np.where(works[:, None], self.up[units], np.float32(0))
        return DenseUnits(np.where(works, self.gate_bias[units], np.float32(0)), up, self.down[:, units])


@dataclass(frozen=True)
class LayerProgram:
    """What is added to one gated MLP ``y = W_down · (silu(W_gate x + b) ⊙ (W_up x)) + d``.

    Unit ``u`` copies neuron ``i = source[u]``: its gate row is ``gate_scale[u] · W_gate[i]``, its gate bias
    ``gate_bias[u]``, its up row ``up_scale[u] · W_up[i]`` and its down column ``W_down[:, i]``. The neurons in ``off``
    get the gate bias :data:`OFF_BIAS`. Dense units come after those that copy.

    Attributes:
        source: ``[copied]`` int64.
        gate_scale: ``[copied]`` float32.
        gate_bias: ``[copied]`` float32.
        up_scale: ``[copied]`` float32.
        off: ``[n]`` int64, sorted.
        copies: the last ``copies * len(off)`` copying units stand for the neurons in ``off``, ``copies`` in a row for
            each; 0 where no units stand for them, or they stand elsewhere.
        corrects: ``[units]`` int64 or None. Where it is ``v >= 0``, unit ``u`` is unit ``v`` over again but for its
            down column, which is what quantising lost of that of ``v``; elsewhere it is -1.
        biased: ``[m]`` int64, sorted; neurons, none of them in ``off``, to whose gate something is added.
        bias: ``[m]`` float32, what is added to the gates of ``biased`` before the non-linearity.
        dense: units of their own, or None.
        down_bias: ``[hidden]`` float32 added to the down projection's output before the model scales it, or None.
        constant: ``[width]`` float32 added to the down projection's input, or None. Whoever has the weights folds
            ``W_down · constant`` into the down bias.
        silent: whether the new down columns are zero, so that the units are computed and change nothing.

    Raises:
        ProfileError: sizes that do not go together, a neuron both biased and off, or a value that is not finite.
    """

    source: Indices
    gate_scale: Floats
    gate_bias: Floats
    up_scale: Floats
    off: Indices
    copies: int = 1
    corrects: Indices | None = None
    biased: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    bias: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    dense: DenseUnits | None = None
    down_bias: Floats | None = None
    constant: Floats | None = None
    silent: bool = False

    def __post_init__(self) -> None:
        if len(self.biased) != len(self.bias) or np.isin(self.biased, self.off).any():
            raise ProfileError("a program biases a neuron that it switches off, or lacks a bias; compile again")
        outer = [one for one in (self.down_bias, self.constant) if one is not None]
        _refuse_infinite("a bias", self.gate_bias, self.bias, *outer)

    @property
    def copied(self) -> int:
        """Number of extra neurons that copy one."""
        return len(self.source)

    @property
    def units(self) -> int:
        """Number of extra neurons."""
        return self.copied + (self.dense.units if self.dense else 0)

    @property
    def touched(self) -> Indices:
        """Sorted neurons of the model that the program copies or changes."""
        constant = self.source[:0] if self.constant is None else np.flatnonzero(self.constant)
        return np.unique(np.concatenate([self.source, self.off, self.biased, constant]))

    @property
    def changes_gates(self) -> bool:
        """Whether the widened gate needs a bias."""
        dense = self.dense is not None and bool(self.dense.gate_bias.any())
        return bool(self.off.size or self.bias.any() or self.gate_bias.any() or dense)

    @property
    def changes_output(self) -> bool:
        """Whether the down projection needs a bias."""
        return any(one is not None and bool(one.any()) for one in (self.down_bias, self.constant))

    def padded(self, units: int) -> LayerProgram:
        """The same program with units that do nothing (zero gate and up rows), ``units`` in all, dense ones last.

        Their down column is a real one, as a column of zeros would widen the range of a quantised block.
        """
        copied = units - (self.units - self.copied)
        last = max(self.copied - 1, 0)
        order = np.append(np.arange(self.copied), np.full(copied - self.copied, last))
        return self.picked(order, np.arange(copied) < self.copied)

    def picked(self, units: Indices, works: npt.NDArray[np.bool_]) -> LayerProgram:
        """Copying units ``units`` in that order, idle where they do not work; any number if the program has none."""

        def pick(values: Floats) -> Floats:
            return (values[units] * works if self.copied else np.zeros(len(units))).astype(np.float32)

        return replace(
            self,
            source=self.source[units] if self.copied else np.zeros(len(units), np.int64),
            gate_scale=pick(self.gate_scale),
            gate_bias=pick(self.gate_bias),
            up_scale=pick(self.up_scale),
            copies=0,
            corrects=None,
        )


def _refuse_infinite(what: str, *values: Floats) -> None:
    if not all(np.isfinite(one).all() for one in values):
        raise ProfileError(f"{what} of a program is not finite; the profile is damaged, identify again")


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
